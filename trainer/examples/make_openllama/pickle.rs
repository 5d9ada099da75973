//! Writes torch's files: a zip archive of stored entries, of which one is a pickle of a dictionary of tensors.

use half::f16;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

/// A tensor of the dictionary.
pub struct Entry {
    /// Its key.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Whether it is float16; else float32.
    pub half: bool,
}

impl Entry {
    /// A float16 tensor.
    pub fn half(name: &str, shape: &[usize]) -> Self {
        Self { name: name.into(), shape: shape.into(), half: true }
    }

    /// Bytes of its values.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * if self.half { 2 } else { 4 }
    }
}

/// A tensor's values.
pub enum Values {
    /// float16.
    Half(Vec<f16>),
    /// float32.
    Float(Vec<f32>),
}

/// A file being written.
pub struct Archive {
    zip: ZipWriter<BufWriter<File>>,
    root: String,
    written: usize,
}

fn options() -> SimpleFileOptions {
    SimpleFileOptions::default().compression_method(CompressionMethod::Stored).large_file(true)
}

impl Archive {
    /// Begins a file with the dictionary of `entries`, whose values are to follow in the same order.
    pub fn create(path: &Path, entries: &[Entry]) -> Result<Self, Box<dyn std::error::Error>> {
        let root = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let mut zip = ZipWriter::new(BufWriter::with_capacity(1 << 20, File::create(path)?));
        zip.start_file(format!("{root}/data.pkl"), options())?;
        zip.write_all(&dictionary(entries))?;
        Ok(Self { zip, root, written: 0 })
    }

    /// Writes the next entry's values.
    pub fn write(&mut self, values: &Values) -> Result<(), Box<dyn std::error::Error>> {
        self.zip.start_file(format!("{}/data/{}", self.root, self.written), options())?;
        let mut put = |bytes: Vec<u8>| self.zip.write_all(&bytes);
        match values {
            Values::Half(values) => {
                values
                    .chunks(1 << 20)
                    .try_for_each(|v| put(v.iter().flat_map(|x| x.to_le_bytes()).collect()))?;
            }
            Values::Float(values) => put(values.iter().flat_map(|x| x.to_le_bytes()).collect())?,
        }
        self.written += 1;
        Ok(())
    }

    /// Ends the file.
    pub fn finish(mut self) -> Result<(), Box<dyn std::error::Error>> {
        self.zip.start_file(format!("{}/version", self.root), options())?;
        self.zip.write_all(b"3\n")?;
        self.zip.finish()?.into_inner()?.sync_all()?;
        Ok(())
    }
}

/// The pickle, protocol 2: an `OrderedDict` of `_rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())`.
fn dictionary(entries: &[Entry]) -> Vec<u8> {
    let mut out = b"\x80\x02ccollections\nOrderedDict\n)R(".to_vec();
    for (place, entry) in entries.iter().enumerate() {
        let count: usize = entry.shape.iter().product();
        text(&mut out, &entry.name);
        out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut out, "storage");
        out.extend(if entry.half { b"ctorch\nHalfStorage\n".as_slice() } else { b"ctorch\nFloatStorage\n" });
        text(&mut out, &place.to_string());
        text(&mut out, "cpu");
        number(&mut out, count);
        out.extend(b"tQ");
        number(&mut out, 0);
        let strides = (0..entry.shape.len()).map(|axis| entry.shape[axis + 1..].iter().product());
        for numbers in [entry.shape.clone(), strides.collect()] {
            out.push(b'(');
            numbers.into_iter().for_each(|n| number(&mut out, n));
            out.push(b't');
        }
        out.extend(b"\x89ccollections\nOrderedDict\n)RtR");
    }
    out.extend(b"u.");
    out
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.push(b'X');
    out.extend((text.len() as u32).to_le_bytes());
    out.extend(text.as_bytes());
}

fn number(out: &mut Vec<u8>, n: usize) {
    out.push(b'J');
    out.extend((n as i32).to_le_bytes());
}
