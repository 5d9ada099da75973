//! The tensors that a pickle of torch describes.
//!
//! A pickle is a program for a stack machine. This machine knows what a dictionary of tensors needs and nothing
//! else: an instruction or a name beyond that is refused, so that no file can run code. Values live in one list and
//! refer to each other by place: what a pickle repeats costs no memory twice.

use super::Stored;
use candle_core::DType;
use std::collections::HashMap;

/// Bytes of a pickle at most. One of a thousand tensors has some 100 kB.
pub(super) const BYTES: u64 = 8 << 20;

/// What is wrong with a pickle.
pub(super) type Problem = String;
type Result<T> = std::result::Result<T, Problem>;

/// A value's place in [`Machine::values`].
type Id = usize;

/// A tensor as a pickle describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tensor {
    /// The storage's name: a file of the archive.
    pub(super) storage: String,
    /// Elements of the storage.
    pub(super) storage_elements: usize,
    /// Bytes of an element.
    pub(super) element_bytes: usize,
    /// Type, shape, strides, and its first element's byte within the storage.
    pub(super) stored: Stored,
}

/// The names that a pickle may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(&'static StorageType),
}

/// A type of storage: torch's name, candle's type if it has it, bytes of an element.
type StorageType = (&'static str, Option<DType>, usize);

const STORAGES: [StorageType; 12] = [
    ("FloatStorage", Some(DType::F32), 4),
    ("HalfStorage", Some(DType::F16), 2),
    ("BFloat16Storage", Some(DType::BF16), 2),
    ("DoubleStorage", Some(DType::F64), 8),
    ("LongStorage", Some(DType::I64), 8),
    ("IntStorage", Some(DType::I32), 4),
    ("ShortStorage", Some(DType::I16), 2),
    ("ByteStorage", Some(DType::U8), 1),
    ("CharStorage", None, 1),
    ("BoolStorage", None, 1),
    ("ComplexFloatStorage", None, 8),
    ("ComplexDoubleStorage", None, 16),
];

fn global(module: &str, name: &str) -> Result<Global> {
    let storage = || STORAGES.iter().find(|storage| module == "torch" && storage.0 == name);
    Ok(match (module, name) {
        ("collections", "OrderedDict") => Global::OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2") => Global::RebuildTensor,
        ("torch._utils", "_rebuild_parameter") => Global::RebuildParameter,
        _ => match storage() {
            Some(storage) => Global::Storage(storage),
            None => return Err(format!("uses {module}.{name}, which is no part of a file of tensors")),
        },
    })
}

#[derive(Debug, Clone)]
enum Value {
    /// `None`, or a number that is none of a shape.
    Other,
    Int(i64),
    /// A text's place in the pickle.
    Text(usize, usize),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    /// Type, name, elements.
    Storage(&'static StorageType, (usize, usize), usize),
    Tensor(Box<Tensor>),
}

/// Reads the tensors of a dictionary by name.
///
/// # Errors
/// The pickle is cut off or broken, holds something else than tensors, or uses more than they need.
pub(super) fn tensors(pickle: &[u8]) -> Result<HashMap<String, Tensor>> {
    let mut machine = Machine {
        pickle,
        at: 0,
        values: Vec::new(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
    };
    let root = machine.run()?;
    let Value::Dict(entries) = &machine.values[root] else {
        return Err("holds no dictionary of tensors".into());
    };
    let mut tensors = HashMap::new();
    for (key, value) in entries {
        let Value::Text(start, end) = machine.values[*key] else {
            return Err("has a tensor whose name is no text".into());
        };
        let name = machine.text(start, end)?;
        match &machine.values[*value] {
            Value::Tensor(tensor) => tensors.insert(name.to_string(), (**tensor).clone()),
            _ => return Err(format!("holds {name:?}, which is no tensor")),
        };
    }
    Ok(tensors)
}

struct Machine<'a> {
    pickle: &'a [u8],
    at: usize,
    values: Vec<Value>,
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: HashMap<usize, Id>,
}

impl Machine<'_> {
    fn run(&mut self) -> Result<Id> {
        loop {
            let start = self.at;
            let [opcode] = self.take()?;
            match self.execute(opcode) {
                Ok(false) => {}
                Ok(true) => return self.pop(),
                Err(problem) => return Err(format!("{problem} (byte {start} of its pickle)")),
            }
        }
    }

    /// Carries out an instruction; true for the last.
    fn execute(&mut self, opcode: u8) -> Result<bool> {
        match opcode {
            0x80 => match self.take()? {
                [2..=5] => {}
                [version] => return Err(format!("is of pickle's version {version}")),
            },
            // A frame says how much could be read at once.
            0x95 => {
                self.take::<8>()?;
            }
            b'.' => return Ok(true),
            b'(' => self.marks.push(self.stack.len()),
            b'0' => {
                self.pop()?;
            }
            b'N' | 0x88 | 0x89 => self.push(Value::Other),
            b'G' => {
                self.take::<8>()?;
                self.push(Value::Other);
            }
            b'K' => {
                let [value] = self.take()?;
                self.push(Value::Int(value.into()));
            }
            b'M' => {
                let value = u16::from_le_bytes(self.take()?);
                self.push(Value::Int(value.into()));
            }
            b'J' => {
                let value = i32::from_le_bytes(self.take()?);
                self.push(Value::Int(value.into()));
            }
            0x8a => self.long()?,
            b'X' => {
                let length = u32::from_le_bytes(self.take()?);
                self.push_text(length as usize)?;
            }
            0x8c => {
                let [length] = self.take()?;
                self.push_text(length.into())?;
            }
            b')' => self.push(Value::Tuple(Vec::new())),
            b']' => self.push(Value::List(Vec::new())),
            b'}' => self.push(Value::Dict(Vec::new())),
            0x85..=0x87 => {
                let from = self.stack.len().checked_sub(usize::from(opcode - 0x84)).ok_or_else(empty)?;
                let items = self.stack.split_off(from);
                self.push(Value::Tuple(items));
            }
            b't' => {
                let items = self.since_mark()?;
                self.push(Value::Tuple(items));
            }
            b'a' => {
                let item = self.pop()?;
                self.append(vec![item])?;
            }
            b'e' => {
                let items = self.since_mark()?;
                self.append(items)?;
            }
            b's' => {
                let from = self.stack.len().checked_sub(2).ok_or_else(empty)?;
                let items = self.stack.split_off(from);
                self.set(&items)?;
            }
            b'u' => {
                let items = self.since_mark()?;
                self.set(&items)?;
            }
            b'q' => {
                let [key] = self.take()?;
                self.remember(key.into())?;
            }
            b'r' => {
                let key = u32::from_le_bytes(self.take()?);
                self.remember(key as usize)?;
            }
            0x94 => self.remember(self.memo.len())?,
            b'h' => {
                let [key] = self.take()?;
                self.recall(key.into())?;
            }
            b'j' => {
                let key = u32::from_le_bytes(self.take()?);
                self.recall(key as usize)?;
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                let global = global(self.text(module.0, module.1)?, self.text(name.0, name.1)?)?;
                self.push(Value::Global(global));
            }
            0x93 => {
                let (name, module) = (self.pop_text()?, self.pop_text()?);
                let global = global(self.text(module.0, module.1)?, self.text(name.0, name.1)?)?;
                self.push(Value::Global(global));
            }
            b'R' => {
                let (arguments, function) = (self.pop()?, self.pop()?);
                self.call(function, arguments)?;
            }
            b'Q' => {
                let id = self.pop()?;
                self.storage(id)?;
            }
            b'b' => {
                // An ordered dictionary's attributes (its `_metadata`) say nothing about tensors.
                self.pop()?;
                match self.top()? {
                    Value::Dict(_) => {}
                    _ => return Err("gives attributes to what is no dictionary".into()),
                }
            }
            other => {
                return Err(format!(
                    "has the pickle instruction 0x{other:02x}, which is no part of a file of tensors"
                ));
            }
        }
        Ok(false)
    }

    fn bytes(&mut self, count: usize) -> Result<usize> {
        let start = self.at;
        match start.checked_add(count) {
            Some(end) if end <= self.pickle.len() => {
                self.at = end;
                Ok(start)
            }
            _ => Err(format!("has a pickle that is cut off at byte {}", self.pickle.len())),
        }
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let start = self.bytes(N)?;
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.pickle[start..self.at]);
        Ok(bytes)
    }

    fn text(&self, start: usize, end: usize) -> Result<&str> {
        std::str::from_utf8(&self.pickle[start..end]).map_err(|_| "has a text that is not UTF-8".into())
    }

    /// A line's place, without its end.
    fn line(&mut self) -> Result<(usize, usize)> {
        let start = self.at;
        let length = self.pickle[start..].iter().position(|byte| *byte == b'\n');
        self.bytes(length.map_or(usize::MAX, |length| length + 1))?;
        Ok((start, self.at - 1))
    }

    fn push(&mut self, value: Value) {
        self.stack.push(self.values.len());
        self.values.push(value);
    }

    fn push_text(&mut self, length: usize) -> Result<()> {
        let start = self.bytes(length)?;
        self.push(Value::Text(start, start + length));
        Ok(())
    }

    fn long(&mut self) -> Result<()> {
        let [length] = self.take()?;
        if length > 8 {
            return Err("has a number above 64 bits".into());
        }
        let start = self.bytes(length.into())?;
        let digits = &self.pickle[start..self.at];
        let sign = if digits.last().is_some_and(|last| *last >= 0x80) { 0xff } else { 0 };
        let mut bytes = [sign; 8];
        bytes[..digits.len()].copy_from_slice(digits);
        self.push(Value::Int(i64::from_le_bytes(bytes)));
        Ok(())
    }

    fn pop(&mut self) -> Result<Id> {
        let marked = self.marks.last().copied().unwrap_or_default();
        match self.stack.len() > marked {
            true => self.stack.pop().ok_or_else(empty),
            false => Err(empty()),
        }
    }

    fn pop_text(&mut self) -> Result<(usize, usize)> {
        let id = self.pop()?;
        match self.values[id] {
            Value::Text(start, end) => Ok((start, end)),
            _ => Err("has a name that is no text".into()),
        }
    }

    fn since_mark(&mut self) -> Result<Vec<Id>> {
        let mark = self.marks.pop().filter(|mark| *mark <= self.stack.len()).ok_or_else(empty)?;
        Ok(self.stack.split_off(mark))
    }

    fn top(&mut self) -> Result<&mut Value> {
        let id = *self.stack.last().ok_or_else(empty)?;
        Ok(&mut self.values[id])
    }

    fn append(&mut self, items: Vec<Id>) -> Result<()> {
        match self.top()? {
            Value::List(list) => list.extend(items),
            _ => return Err("appends to what is no list".into()),
        }
        Ok(())
    }

    fn set(&mut self, items: &[Id]) -> Result<()> {
        let (pairs, rest) = items.as_chunks::<2>();
        match self.top()? {
            Value::Dict(dict) if rest.is_empty() => {
                dict.extend(pairs.iter().map(|[key, value]| (*key, *value)))
            }
            _ => return Err("sets items of what is no dictionary".into()),
        }
        Ok(())
    }

    fn remember(&mut self, key: usize) -> Result<()> {
        let id = *self.stack.last().ok_or_else(empty)?;
        self.memo.insert(key, id);
        Ok(())
    }

    fn recall(&mut self, key: usize) -> Result<()> {
        let id = *self.memo.get(&key).ok_or_else(|| format!("recalls {key}, which it did not keep"))?;
        self.stack.push(id);
        Ok(())
    }

    fn call(&mut self, function: Id, arguments: Id) -> Result<()> {
        let Value::Tuple(arguments) = self.values[arguments].clone() else {
            return Err("calls with what are no arguments".into());
        };
        match (&self.values[function], arguments.as_slice()) {
            (Value::Global(Global::OrderedDict), []) => self.push(Value::Dict(Vec::new())),
            (Value::Global(Global::RebuildTensor), [storage, offset, shape, strides, ..]) => {
                let tensor = self.tensor(*storage, *offset, *shape, *strides)?;
                self.push(Value::Tensor(Box::new(tensor)));
            }
            (Value::Global(Global::RebuildParameter), [tensor, ..]) => self.stack.push(*tensor),
            (Value::Global(other), _) => {
                return Err(format!("calls {other:?} with {} arguments", arguments.len()));
            }
            _ => return Err("calls what is no function".into()),
        }
        Ok(())
    }

    /// `("storage", type, name, device, elements)`.
    fn storage(&mut self, id: Id) -> Result<()> {
        let wrong = || "refers to what is no storage of torch".to_string();
        let Value::Tuple(parts) = &self.values[id] else { return Err(wrong()) };
        let [tag, kind, name, _, elements] = parts[..] else { return Err(wrong()) };
        match (&self.values[tag], &self.values[kind], &self.values[name]) {
            (Value::Text(start, end), Value::Global(Global::Storage(kind)), Value::Text(from, to))
                if self.text(*start, *end)? == "storage" =>
            {
                let (kind, name) = (*kind, (*from, *to));
                let elements = self.size(elements)?;
                self.push(Value::Storage(kind, name, elements));
                Ok(())
            }
            _ => Err(wrong()),
        }
    }

    fn size(&self, id: Id) -> Result<usize> {
        match self.values[id] {
            Value::Int(value) => usize::try_from(value).map_err(|_| format!("has the size {value}")),
            _ => Err("has a size that is no number".into()),
        }
    }

    fn sizes(&self, id: Id) -> Result<Vec<usize>> {
        match &self.values[id] {
            Value::Tuple(items) | Value::List(items) => items.iter().map(|item| self.size(*item)).collect(),
            _ => Err("has a shape that is no list of sizes".into()),
        }
    }

    fn tensor(&self, storage: Id, offset: Id, shape: Id, strides: Id) -> Result<Tensor> {
        let Value::Storage((kind, dtype, element_bytes), (start, end), elements) = self.values[storage]
        else {
            return Err("has a tensor without a storage".into());
        };
        let (offset, shape, strides) = (self.size(offset)?, self.sizes(shape)?, self.sizes(strides)?);
        check_view(elements, offset, &shape, &strides)?;
        let stored = Stored {
            dtype: dtype.ok_or_else(|| (*kind).to_string()),
            strides: Some(strides).filter(|strides| !is_contiguous(&shape, strides)),
            shape,
            start: (offset * element_bytes) as u64,
        };
        let storage = self.text(start, end)?.to_string();
        Ok(Tensor { storage, storage_elements: elements, element_bytes: *element_bytes, stored })
    }
}

fn empty() -> Problem {
    "has a broken pickle: it takes what is not there".into()
}

/// Refuses a view that leaves its storage, or that repeats elements: it would be larger in memory than on disk.
fn check_view(elements: usize, offset: usize, shape: &[usize], strides: &[usize]) -> Result<()> {
    let wrong =
        |what: &str| Err(format!("has a tensor of shape {shape:?} and strides {strides:?} that {what}"));
    if shape.len() != strides.len() {
        return wrong("do not belong together");
    }
    let count = shape.iter().try_fold(1usize, |product, n| product.checked_mul(*n));
    if count.is_none_or(|count| count > elements) {
        return wrong(&format!("has more elements than its storage's {elements}"));
    }
    if count == Some(0) {
        return if offset <= elements { Ok(()) } else { wrong("starts behind its storage") };
    }
    let steps = shape.iter().zip(strides).map(|(n, stride)| (n - 1).checked_mul(*stride));
    let last = steps.chain([Some(offset)]).try_fold(0usize, |sum, step| sum.checked_add(step?));
    match last {
        Some(last) if last < elements => Ok(()),
        _ => wrong(&format!("leaves its storage of {elements} elements from {offset} on")),
    }
}

fn is_contiguous(shape: &[usize], strides: &[usize]) -> bool {
    let mut expected = 1;
    shape.iter().zip(strides).rev().all(|(n, stride)| {
        let fits = *n <= 1 || *stride == expected;
        expected = usize::saturating_mul(expected, *n.max(&1));
        fits
    })
}

#[cfg(test)]
mod tests;
