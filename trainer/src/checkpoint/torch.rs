//! torch's zip archive: `NAME/data.pkl` describes tensors, `NAME/data/KEY` holds a storage each.

use super::{Stored, pickle};
use crate::error::{Result, TrainError};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;
use zip::ZipArchive;
use zip::read::ZipFile;

/// The end of a zip archive: its mark, and how far from a file's end that can be.
const END: (&[u8], u64) = (b"PK\x05\x06", 22 + u16::MAX as u64);

/// How files of torch before 1.6 start: a pickle of torch's magic number.
const LEGACY: &[u8] = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19";

/// What a file's pickle says of its tensors.
///
/// # Errors
/// The file is cut off, broken, or of torch before 1.6; its pickle asks for more than tensors.
pub(super) fn tensors(file: &Path) -> Result<BTreeMap<String, Stored>> {
    let broken = |problem: String| TrainError::model(file, problem, "download the file again");
    let mut archive = open(file)?;
    let mut storages = HashMap::new();
    let mut found = None;
    for i in 0..archive.len() {
        let entry = archive.by_index_raw(i).map_err(|e| broken(format!("is a broken zip archive ({e})")))?;
        let name = entry.name().map_err(|e| broken(format!("is a broken zip archive ({e})")))?.into_owned();
        let place = place(&entry, &name).map_err(broken)?;
        // The archive's own name stands in front.
        let name = name.split_once('/').map_or(name.as_str(), |(_, name)| name);
        match name {
            "data.pkl" => found = Some((i, place)),
            "byteorder" => check_order(entry).map_err(broken)?,
            _ => {
                if let Some(key) = name.strip_prefix("data/") {
                    storages.insert(key.to_string(), place);
                }
            }
        }
    }
    let Some((i, (_, bytes))) = found else {
        return Err(broken("is a zip archive without a data.pkl, which torch's files have".into()));
    };
    if bytes > pickle::BYTES {
        return Err(broken(format!("has a pickle of {bytes} bytes, above {}", pickle::BYTES)));
    }
    let mut text = Vec::with_capacity(bytes as usize);
    let entry = archive.by_index_raw(i).map_err(|e| broken(format!("is a broken zip archive ({e})")))?;
    entry
        .take(pickle::BYTES)
        .read_to_end(&mut text)
        .map_err(|e| broken(format!("has a broken data.pkl ({e})")))?;
    let tensors = pickle::tensors(&text).map_err(|problem| {
        TrainError::model(
            file,
            problem,
            "use the model's safetensors, or a file that holds its state_dict alone",
        )
    })?;
    tensors
        .into_iter()
        .map(|(name, tensor)| Ok((name.clone(), placed(&name, tensor, &storages).map_err(broken)?)))
        .collect()
}

/// A tensor's place in the file.
fn placed(
    name: &str,
    tensor: pickle::Tensor,
    storages: &HashMap<String, (u64, u64)>,
) -> std::result::Result<Stored, String> {
    let key = &tensor.storage;
    let (start, bytes) =
        storages.get(key).ok_or_else(|| format!("lacks data/{key}, the storage of {name}"))?;
    if tensor.storage_elements.checked_mul(tensor.element_bytes).is_none_or(|need| need as u64 != *bytes) {
        return Err(format!(
            "has {bytes} bytes in data/{key}, not the {} elements of {} bytes that {name} is made of",
            tensor.storage_elements, tensor.element_bytes
        ));
    }
    Ok(Stored { start: start + tensor.stored.start, ..tensor.stored })
}

/// The archive, if its end is there.
fn open(file: &Path) -> Result<ZipArchive<BufReader<File>>> {
    let io = TrainError::io;
    let mut reader = File::open(file).map_err(io(file))?;
    let length = reader.metadata().map_err(io(file))?.len();
    let mut start = Vec::new();
    (&reader).take(LEGACY.len() as u64).read_to_end(&mut start).map_err(io(file))?;
    if start == LEGACY {
        return Err(TrainError::model(
            file,
            "is written in the format of torch before 1.6",
            "write it anew with a later torch: torch.save(torch.load(FILE, weights_only=True), FILE)",
        ));
    }
    if !start.starts_with(b"PK") {
        return Err(TrainError::model(
            file,
            "is no file of torch: it is no zip archive",
            "download the file again",
        ));
    }
    reader.seek(SeekFrom::Start(length.saturating_sub(END.1))).map_err(io(file))?;
    let mut end = Vec::new();
    (&reader).take(END.1).read_to_end(&mut end).map_err(io(file))?;
    if !end.windows(END.0.len()).any(|window| window == END.0) {
        let problem = format!("is cut off at byte {length}: the end of its zip archive is not there");
        return Err(TrainError::model(file, problem, "download the file again"));
    }
    ZipArchive::new(BufReader::new(reader)).map_err(|e| {
        TrainError::model(file, format!("is a broken zip archive ({e})"), "download the file again")
    })
}

/// First byte and bytes of an entry, which must stand in the file as it is.
fn place(entry: &ZipFile<'_, BufReader<File>>, name: &str) -> std::result::Result<(u64, u64), String> {
    if entry.compression() != zip::CompressionMethod::Stored || entry.encrypted() {
        return Err(format!("has {name} compressed, which torch never does"));
    }
    match entry.data_start() {
        Some(start) => Ok((start, entry.size())),
        None => Err(format!("is a broken zip archive: {name} has no place")),
    }
}

fn check_order(entry: impl Read) -> std::result::Result<(), String> {
    let mut order = Vec::new();
    entry.take(16).read_to_end(&mut order).map_err(|e| format!("has a broken byteorder ({e})"))?;
    match order.as_slice() {
        b"little" => Ok(()),
        _ => Err("was written on a machine of another byte order, which cannot be read".into()),
    }
}
