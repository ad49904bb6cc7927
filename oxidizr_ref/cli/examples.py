"""Examples of every command. In this order, and beside a ``book.txt``, each works as it is printed; a test runs them."""

from __future__ import annotations

#: By command, what is done and how. `""`: what somebody needs who is here for the first time.
EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "": (
        ("train a first model, of a million parameters, in about a minute", "oxidizr-ref train -f nano-start"),
        ("let it write", 'oxidizr-ref generate checkpoints/nano-start -p "The sun"'),
        ("see in the browser how it went", "oxidizr-ref report checkpoints/nano-start --open"),
    ),
    "train": (
        ("go on after Ctrl-C, a crash or a power cut", "oxidizr-ref train -f nano-start --resume auto"),
        ("another model on a text of one's own", "oxidizr-ref train -f llama-start -d book.txt --max-steps 200"),
        (
            "for programs, with another learning rate, from the start",
            "oxidizr-ref train --headless --set learning_rate=1e-3 --overwrite",
        ),
    ),
    "report": (
        ("a page beside the checkpoints: report.html", "oxidizr-ref report checkpoints/nano-start"),
        (
            "two runs in the same charts",
            "oxidizr-ref report checkpoints/nano-start --with checkpoints/llama-start",
        ),
    ),
    "prepare": (
        ("a text as bytes, and what is in it", "oxidizr-ref prepare book.txt -o book.bin --stats"),
        ("with a tenth held out", "oxidizr-ref prepare book.txt -o split.bin --validation 0.1"),
        ("with a BPE vocabulary of 300, trained on it", "oxidizr-ref prepare book.txt -o bpe.bin --train-bpe 300"),
    ),
    "convert": (
        ("to Hugging Face's layout", "oxidizr-ref convert checkpoints/llama-start -o llama"),
        ("and back, to train on", "oxidizr-ref convert llama -o back.safetensors"),
    ),
    "generate": (
        ("ask a question", 'oxidizr-ref generate checkpoints/nano-start --user "What is a tree?"'),
        ("always the likeliest token, as JSON", "oxidizr-ref generate checkpoints/nano-start -p A --temperature 0 --json"),
        ("a conversation, on a terminal", "oxidizr-ref generate checkpoints/nano-start"),
    ),
    "eval": (
        ("how well it predicts another text", "oxidizr-ref eval checkpoints/nano-start -d book.txt"),
        (
            "is the other model better, for certain?",
            "oxidizr-ref eval checkpoints/nano-start -d book.txt --compare back.safetensors",
        ),
    ),
    "pack": (
        (
            "the newest step, as me/nano-start",
            "oxidizr-ref pack --checkpoint-dir checkpoints/nano-start -c latest -u me",
        ),
        (
            "the last step of the run, into a directory of one's choice",
            "oxidizr-ref pack --checkpoint-dir checkpoints/nano-start -c final -o packed",
        ),
    ),
    "push": (
        ("with HF_TOKEN in the environment", "oxidizr-ref push -m hf/me/nano-start --create-repo --private"),
        ("where there is nobody to ask", "oxidizr-ref push -m hf/me/nano-start --repo me/nano-start --yes"),
    ),
    "inspect": (
        ("what a config makes, and the memory it takes", "oxidizr-ref inspect -f nano --seq-len 1024 --dtype bf16"),
        ("what is in the newest checkpoint", "oxidizr-ref inspect checkpoints/nano-start"),
    ),
    "verify": (
        ("is every bit as it was written?", "oxidizr-ref verify checkpoints/nano-start checkpoints/llama-start"),
        ("the same for programs", "oxidizr-ref verify checkpoints/nano-start --json"),
    ),
    "diff": (
        ("where do two checkpoints differ?", "oxidizr-ref diff checkpoints/nano-start checkpoints/llama-start"),
        (
            "did converting there and back keep every weight?",
            "oxidizr-ref diff back.safetensors checkpoints/llama-start --weights-only",
        ),
    ),
    "bench": (
        ("what a step costs here", "oxidizr-ref bench -f nano-start"),
        ("for a flame graph", "oxidizr-ref bench -f tiny-hybrid --rounds 3 --profile step.folded"),
    ),
    "selftest": (
        ("does the promise hold on this machine?", "oxidizr-ref selftest"),
        ("and on its CUDA device?", "oxidizr-ref selftest --target-device gpu"),
    ),
    "trace record": (
        (
            "a reference in double precision",
            "oxidizr-ref trace record -f tiny-llama --dtype f64 -o golden.trace",
        ),
        (
            "the same step as another program would do it",
            "oxidizr-ref trace record -f tiny-llama --weights golden.trace -o mine.trace",
        ),
    ),
    "trace compare": (
        ("where do they part?", "oxidizr-ref trace compare golden.trace mine.trace"),
        ("every tensor", "oxidizr-ref trace compare golden.trace mine.trace --all"),
    ),
    "trace show": (
        ("what is in it, in the order of execution", "oxidizr-ref trace show golden.trace"),
        ("the same for programs", "oxidizr-ref trace show golden.trace --json"),
    ),
    "trace golden": (
        ("the whole published set", "oxidizr-ref trace golden -o golden"),
        ("one of it", "oxidizr-ref trace golden -o golden --only tiny-llama-f32"),
    ),
    "trace": (
        ("every number of a training step", "oxidizr-ref trace record -f tiny-mamba1 -o mamba.trace"),
        ("what these are", "oxidizr-ref trace show mamba.trace"),
    ),
}


def shown(command: str) -> str:
    """The examples of a command, each below a comment that says what it does."""
    return "\n".join(f"  # {what}\n  {line}" for what, line in EXAMPLES.get(command, ()))
