"""``python -m oxidizr_ref``: the same as the command ``oxidizr-ref``."""

from oxidizr_ref.cli.main import main

if __name__ == "__main__":
    main()
