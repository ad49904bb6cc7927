//! Lists what a golden trace holds, in the order of execution, and computes every RMSNorm of layer 0 again
//! (see docs/trace_format.md).
//!
//!     rustc --edition 2021 -O read_trace.rs && ./read_trace reference.safetensors [EPS]      (1e-5 where it is not given)
//!
//! Only the standard library is used (rustc 1.77 or newer). Exit code 0: all agree; 1: some do not; 2: the file is no whole
//! trace, or has no RMSNorm; the reason is on stderr.

use std::collections::{HashMap, HashSet};
use std::io::{BufWriter, Write};
use std::process::ExitCode;

type Result<T> = std::result::Result<T, String>;

// --- the JSON of a header and of its records: objects, lists, strings, and whole numbers without a sign ----------------

enum Json {
    Text(String),
    Number(usize),
    List(Vec<Json>),
    Object(Vec<(String, Json)>), // in the order of the file, every key once
}

impl Json {
    fn parse(text: &str) -> Result<Json> {
        if !text.is_ascii() {
            return Err("its JSON is not ASCII".into());
        }
        let mut parser = Parser { rest: text, depth: 0 };
        let value = parser.value()?;
        match parser.next() {
            None => Ok(value),
            Some(c) => Err(format!("its JSON goes on after its end, with {c:?}")),
        }
    }

    fn text(&self) -> Result<&str> {
        match self {
            Json::Text(text) => Ok(text),
            _ => Err("a string is missing in its JSON".into()),
        }
    }

    fn number(&self) -> Result<usize> {
        match self {
            Json::Number(number) => Ok(*number),
            _ => Err("a number is missing in its JSON".into()),
        }
    }

    fn list(&self) -> Result<&[Json]> {
        match self {
            Json::List(items) => Ok(items),
            _ => Err("a list is missing in its JSON".into()),
        }
    }

    fn object(&self) -> Result<&[(String, Json)]> {
        match self {
            Json::Object(items) => Ok(items),
            _ => Err("an object is missing in its JSON".into()),
        }
    }

    fn get(&self, key: &str) -> Result<Option<&Json>> {
        Ok(self.object()?.iter().find(|(other, _)| other == key).map(|(_, value)| value))
    }

    fn need(&self, key: &str) -> Result<&Json> {
        self.get(key)?.ok_or_else(|| format!("{key} is missing in its JSON"))
    }

    fn numbers(&self) -> Result<Vec<usize>> {
        self.list()?.iter().map(Json::number).collect()
    }

    fn texts(&self) -> Result<Vec<String>> {
        self.list()?.iter().map(|item| item.text().map(String::from)).collect()
    }
}

struct Parser<'a> {
    rest: &'a str, // ASCII: every byte is a character
    depth: usize,
}

impl Parser<'_> {
    /// The next character that is no space.
    fn next(&mut self) -> Option<char> {
        self.rest = self.rest.trim_start_matches([' ', '\t', '\r', '\n']);
        self.rest.chars().next()
    }

    /// Whether this character is next; then it is behind us.
    fn skip(&mut self, wanted: char) -> bool {
        let found = self.next() == Some(wanted);
        if found {
            self.rest = &self.rest[1..];
        }
        found
    }

    fn expect(&mut self, wanted: char) -> Result<()> {
        if self.skip(wanted) {
            Ok(())
        } else {
            Err(format!("{wanted:?} is missing in its JSON"))
        }
    }

    fn value(&mut self) -> Result<Json> {
        self.depth += 1;
        if self.depth > 8 {
            return Err("its JSON is nested too deeply".into());
        }
        let value = match self.next() {
            Some('"') => Json::Text(self.string()?),
            Some('0'..='9') => self.digits()?,
            Some('[') => Json::List(self.items(']', Parser::value)?),
            Some('{') => {
                let entry = |parser: &mut Self| {
                    let key = parser.string()?;
                    parser.expect(':')?;
                    Ok((key, parser.value()?))
                };
                let items = self.items('}', entry)?;
                let mut seen = HashSet::new();
                if let Some((key, _)) = items.iter().find(|(key, _)| !seen.insert(key)) {
                    return Err(format!("{key} stands twice in its JSON"));
                }
                Json::Object(items)
            }
            _ => return Err("a value is missing in its JSON".into()),
        };
        self.depth -= 1;
        Ok(value)
    }

    /// What stands between two brackets, with commas between.
    fn items<T>(&mut self, end: char, mut item: impl FnMut(&mut Self) -> Result<T>) -> Result<Vec<T>> {
        let mut items = Vec::new();
        self.rest = &self.rest[1..];
        if self.skip(end) {
            return Ok(items);
        }
        loop {
            items.push(item(self)?);
            if !self.skip(',') {
                self.expect(end)?;
                return Ok(items);
            }
        }
    }

    fn digits(&mut self) -> Result<Json> {
        let end = self.rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(self.rest.len());
        let (digits, rest) = self.rest.split_at(end);
        self.rest = rest;
        match digits.parse() {
            Ok(number) if digits == "0" || !digits.starts_with('0') => Ok(Json::Number(number)),
            _ => Err(format!("{digits} is no number in its JSON")),
        }
    }

    fn string(&mut self) -> Result<String> {
        self.expect('"')?;
        let mut units = Vec::new(); // of UTF-16: \uXXXX gives these, in pairs for what is beyond U+FFFF
        loop {
            match self.take()? {
                '"' => return String::from_utf16(&units).map_err(|_| "a \\u in its JSON is half a character".into()),
                '\\' => units.push(match self.take()? {
                    'b' => 8,
                    'f' => 12,
                    'n' => 10,
                    'r' => 13,
                    't' => 9,
                    'u' => {
                        let digits = self.rest.get(..4).unwrap_or("");
                        if digits.len() < 4 || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                            return Err("a \\u in its JSON lacks its four digits".into());
                        }
                        self.rest = &self.rest[4..];
                        u16::from_str_radix(digits, 16).map_err(|error| error.to_string())?
                    }
                    c @ ('"' | '\\' | '/') => c as u16,
                    c => return Err(format!("\\{c} means nothing in JSON")),
                }),
                c @ ' '..='~' => units.push(c as u16),
                _ => return Err("a string in its JSON holds a control character".into()),
            }
        }
    }

    fn take(&mut self) -> Result<char> {
        let c = self.rest.chars().next().ok_or("a string in its JSON has no end")?;
        self.rest = &self.rest[1..];
        Ok(c)
    }
}

// --- the file ----------------------------------------------------------------------------------------------------------

#[derive(Clone, Copy, PartialEq)]
enum Dtype {
    F64,
    F32,
    I64,
    U32,
}

struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: std::ops::Range<usize>, // of the file
}

/// What a trace says of a tensor. Of one of which a sample was kept, `sample` names the tensor of the indices.
struct Record {
    name: String,
    role: String,
    op: String,
    layer: Option<usize>,
    shape: Vec<usize>,
    inputs: Vec<String>,
    sample: String,
}

struct Trace {
    file: Vec<u8>,
    tensors: HashMap<String, Tensor>,
    records: Vec<Record>, // in the order of execution
}

impl Trace {
    fn open(path: &str) -> Result<Trace> {
        let file = std::fs::read(path).map_err(|error| error.to_string())?;
        let (length, rest) = file.split_first_chunk::<8>().ok_or("it is shorter than the length of a header")?;
        let length = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
        if length > 100_000_000 || length > rest.len() {
            return Err("its header is longer than the file, or than any header".into());
        }
        let text = std::str::from_utf8(&rest[..length]).ok().filter(|text| text.starts_with('{'));
        let header = Json::parse(text.ok_or("its header is no text that begins with {")?)?;

        let (mut tensors, mut metadata) = (HashMap::new(), HashMap::new());
        for (name, entry) in header.object()? {
            if name == "__metadata__" {
                for (key, value) in entry.object()? {
                    metadata.insert(key.as_str(), value.text()?);
                }
            } else {
                let tensor = tensor(entry, 8 + length).map_err(|error| format!("{name}: {error}"))?;
                tensors.insert(name.clone(), tensor);
            }
        }
        if let Some(version) = metadata.get("trace_version").filter(|version| **version != "1") {
            return Err(format!("this program reads trace_version 1, not {version}"));
        }
        let mut order: Vec<(&String, &Tensor)> = tensors.iter().collect();
        order.sort_by_key(|(name, tensor)| (tensor.bytes.start, tensor.bytes.end, *name));
        let mut end = 8 + length;
        for (name, tensor) in &order {
            if tensor.bytes.start != end {
                return Err(format!("there is a gap or an overlap before {name}"));
            }
            end = tensor.bytes.end;
        }
        if end != file.len() {
            return Err("it is cut short, or has bytes that belong to no tensor".into());
        }
        let records = match metadata.get("records") {
            Some(records) => Json::parse(records)?.list()?.iter().map(record).collect::<Result<Vec<Record>>>()?,
            None => order.iter().map(|(name, tensor)| unrecorded(name, tensor)).collect(),
        };
        let mut seen = HashSet::new();
        for record in &records {
            let tensor = tensors.get(&record.name).ok_or_else(|| format!("it does not hold {}", record.name))?;
            if !seen.insert(&record.name) {
                return Err(format!("{} is recorded twice", record.name));
            }
            let right =
                if record.sample.is_empty() { record.shape == tensor.shape } else { tensors.contains_key(&record.sample) };
            if !right {
                return Err(format!("header and records do not agree on {}", record.name));
            }
        }
        Ok(Trace { tensors, records, file })
    }

    fn numbers(&self, name: &str) -> Result<Vec<f64>> {
        let tensor = self.tensors.get(name).ok_or_else(|| format!("there is no {name}"))?;
        let bytes = &self.file[tensor.bytes.clone()];
        let eight = bytes.chunks_exact(8).map(|item| u64::from_le_bytes(item.try_into().unwrap()));
        let four = bytes.chunks_exact(4).map(|item| u32::from_le_bytes(item.try_into().unwrap()));
        Ok(match tensor.dtype {
            Dtype::F64 => eight.map(f64::from_bits).collect(),
            Dtype::I64 => eight.map(|bits| bits as i64 as f64).collect(),
            Dtype::F32 => four.map(|bits| f64::from(f32::from_bits(bits))).collect(),
            Dtype::U32 => four.map(f64::from).collect(),
        })
    }
}

fn tensor(entry: &Json, payload: usize) -> Result<Tensor> {
    let (dtype, item) = match entry.need("dtype")?.text()? {
        "F64" => (Dtype::F64, 8),
        "F32" => (Dtype::F32, 4),
        "I64" => (Dtype::I64, 8),
        "U32" => (Dtype::U32, 4),
        other => return Err(format!("{other} is no dtype of a trace")),
    };
    let shape = entry.need("shape")?.numbers()?;
    let [begin, end] = entry.need("data_offsets")?.numbers()?[..] else {
        return Err("data_offsets are not two".into());
    };
    let size = shape.iter().try_fold(item, |size: usize, length| size.checked_mul(*length));
    if entry.object()?.len() != 3 || size.is_none() || end.checked_sub(begin) != size {
        return Err("shape and data_offsets do not agree, or something strange is said".into());
    }
    let end = end.checked_add(payload).ok_or("it ends beyond any file")?;
    Ok(Tensor { dtype, shape, bytes: begin + payload..end })
}

fn record(entry: &Json) -> Result<Record> {
    let known = ["name", "role", "op", "layer", "shape", "inputs", "sample", "digest", "parts"];
    if let Some((key, _)) = entry.object()?.iter().find(|(key, _)| !known.contains(&key.as_str())) {
        return Err(format!("a record has {key}, which this program does not know"));
    }
    let text = |key: &str| entry.get(key)?.map_or(Ok(String::new()), |value| value.text().map(String::from));
    Ok(Record {
        name: entry.need("name")?.text()?.into(),
        role: entry.need("role")?.text()?.into(),
        op: text("op")?,
        layer: entry.get("layer")?.map(Json::number).transpose()?,
        shape: entry.need("shape")?.numbers()?,
        inputs: entry.get("inputs")?.map_or(Ok(Vec::new()), Json::texts)?,
        sample: text("sample")?,
    })
}

/// Of a file without records, such as another program's.
fn unrecorded(name: &str, tensor: &Tensor) -> Record {
    let (op, inputs, sample) = Default::default();
    Record { name: name.into(), role: "unknown".into(), op, layer: None, shape: tensor.shape.clone(), inputs, sample }
}

// --- what is done with it ----------------------------------------------------------------------------------------------

/// The relative error (largest difference over largest number) of `y = x / sqrt(mean(x²) + eps) * weight`, the mean over
/// groups of channels where there are several. None where not all of it is in the trace.
fn error_of_norm(trace: &Trace, record: &Record, eps: f64) -> Result<Option<f64>> {
    let ending = |end: &str| record.inputs.iter().find(|name| name.ends_with(end));
    let other = record.inputs.iter().find(|name| !name.ends_with(".weight") && !name.ends_with(".rms"));
    let (Some(weight), Some(rms), Some(x)) = (ending(".weight"), ending(".rms"), other) else { return Ok(None) };
    let (x, weight, y) = (trace.numbers(x)?, trace.numbers(weight)?, trace.numbers(&record.name)?);
    let groups = trace.numbers(rms)?.len();
    if x.len() != y.len() || groups == 0 || weight.is_empty() || x.len() % groups != 0 || x.is_empty() {
        return Ok(None); // a sample of it was kept
    }
    let (mut difference, mut largest) = (0.0f64, 0.0f64);
    let width = x.len() / groups;
    for (start, group) in x.chunks_exact(width).enumerate().map(|(i, group)| (i * width, group)) {
        let rms = (group.iter().map(|x| x * x).sum::<f64>() / width as f64 + eps).sqrt();
        for (i, x) in (start..).zip(group) {
            let ours = x / rms * weight[i % weight.len()];
            let apart = (ours - y[i]).abs();
            difference = difference.max(if apart.is_nan() { f64::INFINITY } else { apart });
            largest = largest.max(ours.abs());
        }
    }
    Ok(Some(difference / largest.max(f64::MIN_POSITIVE)))
}

fn run(path: &str, eps: f64) -> Result<bool> {
    let trace = Trace::open(path)?;
    let mut out = BufWriter::new(std::io::stdout().lock());
    let unwritten = |error: std::io::Error| error.to_string();
    for record in &trace.records {
        let layer = record.layer.map_or(String::new(), |layer| layer.to_string());
        let (name, role, op, shape, inputs) = (&record.name, &record.role, &record.op, &record.shape, &record.inputs);
        let (inputs, sample) = (inputs.join(" "), &record.sample);
        writeln!(out, "{name}\t{role}\t{op}\t{layer}\t{shape:?}\t{inputs}\t{sample}").map_err(unwritten)?;
    }
    let (mut checked, mut agree) = (0, true);
    let norms = |record: &&Record| record.op == "rms_norm" && record.layer == Some(0) && record.name.ends_with(".output");
    for record in trace.records.iter().filter(norms) {
        if let Some(error) = error_of_norm(&trace, record, eps)? {
            let bound = if trace.tensors[&record.name].dtype == Dtype::F64 { 1e-12 } else { 1e-5 };
            let verdict = if error <= bound { "agrees" } else { "WRONG" };
            writeln!(out, "{}: relative error {error:.2e}, {verdict}", record.name).map_err(unwritten)?;
            agree &= error <= bound;
            checked += 1;
        }
    }
    out.flush().map_err(unwritten)?;
    if checked == 0 {
        Err("it has no RMSNorm of layer 0 that can be computed again".into())
    } else {
        Ok(agree)
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let eps = arguments.get(2).map_or(Ok(1e-5), |eps| eps.parse());
    let (2..=3, Ok(eps)) = (arguments.len(), eps) else {
        eprintln!("usage: read_trace TRACE [EPS]");
        return ExitCode::from(2);
    };
    match run(&arguments[1], eps) {
        Ok(agree) => ExitCode::from(u8::from(!agree)),
        Err(why) => {
            eprintln!("{}: {why}", arguments[1]);
            ExitCode::from(2)
        }
    }
}
