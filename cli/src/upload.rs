//! What a sweep names on this machine, uploaded to a server elsewhere: once, and only what the server lacks.

mod send;

use crate::bar::Bar;
use crate::client::{Connection, ServerArgs};
use crate::output::{bytes, say};
use crate::plan::BaseModels;
use crate::{Failure, agents, evaluations};
use clap::ValueEnum;
use config::paths::{self, Named, Place, What};
use config::sweep_file::Loaded;
use domain::data::{ContentHash, Reference, Tree, TreeFile};
use gpu_agent::engine::simulated;
use hub::HubError;
use send::Sender;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Ends of files of rows.
const ROWS: [&str; 3] = [".jsonl", ".json", ".parquet"];

/// The end of a text, which some tasks read as one document.
const TEXT: &str = ".txt";

/// What an adapter's files begin with.
const ADAPTER: &str = "adapter_";

/// What a model's shape is read from.
const CONFIGURATION: &str = "config.json";

/// The name of a directory that has none, such as `/`.
const NAMELESS: &str = "data";

/// What becomes of data that is here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Data {
    /// The server gets it.
    Upload,
    /// Each agent has it at the same path.
    InPlace,
}

/// How a server elsewhere comes to models and data.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct DataArgs {
    /// With --endpoint, what becomes of models, adapters and rows that lie on this machine: `upload` gives the server what it
    /// lacks of them; `in-place` has each agent read the same path on its own machine, as it does with an absolute path that
    /// is not here.
    #[arg(long, value_enum, default_value = "upload", value_name = "upload|in-place")]
    data: Data,
}

/// A file or directory that a sweep names here.
struct Local {
    /// What the sweep says.
    name: String,
    /// Where it stands there.
    at: String,
    what: What,
    files: Vec<LocalFile>,
    /// Its own name, without folders.
    called: String,
    is_directory: bool,
}

/// A file to upload.
struct LocalFile {
    name: String,
    path: PathBuf,
    bytes: u64,
}

impl DataArgs {
    /// Uploads what the sweep names here, and has the sweep name that. Answers with the shapes of the models among it.
    ///
    /// # Errors
    /// Something cannot be read or uploaded.
    pub(crate) async fn place(
        &self,
        loaded: &mut Loaded,
        server: &ServerArgs,
        connection: &Connection,
    ) -> Result<BaseModels, Failure> {
        let mut base_models = BaseModels::new();
        if self.data == Data::InPlace {
            return Ok(base_models);
        }
        evaluations::documents_here(loaded)?;
        evaluations::folders(loaded)?;
        let found: Vec<_> = paths::named(&loaded.document).into_iter().filter_map(Local::find).collect();
        let mut new_names = BTreeMap::new();
        // A simulated device reads no weights.
        let weights = !agents::are_simulated(connection).await?;
        let mut sender = Sender::new(server, connection);
        for mut local in found {
            if new_names.contains_key(&local.name) {
                continue;
            }
            let place = |problem: &dyn std::fmt::Display| {
                Failure::invalid(format!("{}: {}: {problem}", loaded.locate(&local.at), local.at))
            };
            if paths::is_compared(&loaded.document, &local.name) {
                let problem = "a `when` or a constraint compares with it, and what is uploaded gets another name; use \
                               --data in-place";
                return Err(place(&problem));
            }
            let shape = match local.what {
                What::Model => {
                    Some(simulated::shape(&local.name).map_err(|failure| place(&failure.message))?)
                }
                What::Rows | What::Adapter | What::Documents => None,
            };
            local.files =
                files(Path::new(&local.name), local.what, weights).map_err(|problem| place(&problem))?;
            let (local, tree) =
                tokio::task::spawn_blocking(move || local.hashed()).await.map_err(Failure::failed)??;
            let reference =
                Reference { tree: tree.id(), name: local.called.clone(), is_directory: local.is_directory };
            upload(&local, &tree, &mut sender).await?;
            base_models.extend(shape.map(|shape| (reference.to_string(), shape.into())));
            new_names.insert(local.name, reference.to_string());
        }
        paths::rename(&mut loaded.document, &|name| new_names.get(name).cloned());
        Ok(base_models)
    }
}

/// Uploads what the server lacks of a tree, then has it be there as a whole.
async fn upload(local: &Local, tree: &Tree, sender: &mut Sender<'_>) -> Result<(), Failure> {
    let missing = sender.missing(tree.files().iter().map(|file| file.sha256).collect()).await?;
    let of = |file: ContentHash| {
        let named = tree.files().iter().find(|known| known.sha256 == file);
        named.and_then(|named| local.files.iter().find(|local| local.name == named.name))
    };
    let wanted: Vec<_> = missing.iter().filter_map(|(file, from)| Some((*file, *from, of(*file)?))).collect();
    let total: u64 = wanted.iter().map(|(_, _, file)| file.bytes).sum();
    let there: u64 = wanted.iter().map(|(_, from, _)| from).sum();
    if total > 0 {
        let bar = Bar::new("uploading", &local.called, there, total);
        let mut done = 0;
        for (hash, from, file) in wanted {
            sender.file(&file.path, hash, file.bytes, from, &|sent| bar.set(done + sent)).await?;
            done += file.bytes;
        }
    }
    sender.commit(tree).await?;
    say!("{}: {}, of which {} were uploaded now", local.called, bytes(tree.bytes()), bytes(total - there));
    Ok(())
}

impl Local {
    /// What a name leads to, if that is here.
    fn find(named: Named) -> Option<Self> {
        let Named { at, name, what, place } = named;
        let path = Path::new(&name);
        let about = (place == Place::Path && path.is_absolute()).then(|| path.metadata().ok())??;
        let called = path.file_name().map_or(NAMELESS.into(), |name| name.to_string_lossy().into_owned());
        let is_directory = about.is_dir();
        // A directory's name says nothing to programs, and a hidden one is no name to share.
        let called = match is_directory && called.starts_with('.') {
            true => NAMELESS.into(),
            false => called,
        };
        Some(Self { name, at, what, files: Vec::new(), called, is_directory })
    }

    /// Reads every file of it for its hash.
    fn hashed(self) -> Result<(Self, Tree), Failure> {
        let total = self.files.iter().map(|file| file.bytes).sum();
        let bar = Bar::new("hashing", &self.called, 0, total);
        let mut files = Vec::new();
        for LocalFile { name, path, bytes } in &self.files {
            let (read, sha256) = hash(path, &bar).map_err(|error| unreadable(path, &error))?;
            if read != *bytes {
                return Err(changed(path));
            }
            files.push(TreeFile { name: name.clone(), bytes: read, sha256 });
        }
        let tree = Tree::new(files).map_err(|error| Failure::invalid(format!("{}: {error}", self.name)))?;
        Ok((self, tree))
    }
}

fn unreadable(path: &Path, error: &std::io::Error) -> Failure {
    Failure::invalid(format!("{}: cannot be read: {error}", path.display()))
}

fn changed(path: &Path) -> Failure {
    Failure::failed(format!(
        "{}: changed while it was read; submit it once it stays as it is",
        path.display()
    ))
}

/// A file's length and SHA-256.
fn hash(path: &Path, bar: &Bar) -> std::io::Result<(u64, ContentHash)> {
    let (mut file, mut buffer) = (File::open(path)?, vec![0; proto::CHUNK_BYTES]);
    let (mut digest, mut bytes) = (Sha256::new(), 0);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok((bytes, ContentHash(digest.finalize().into()))),
            read => {
                digest.update(&buffer[..read]);
                bytes += read as u64;
                bar.add(read as u64);
            }
        }
    }
}

/// The files that are read of a file or directory of its kind; of a model, `weights` says whether they are.
fn files(path: &Path, what: What, weights: bool) -> Result<Vec<LocalFile>, String> {
    let unreadable =
        |path: &Path, error: &std::io::Error| format!("{}: cannot be read: {error}", path.display());
    let about = |name: String, path: PathBuf| {
        let about = path.metadata().map_err(|error| unreadable(&path, &error))?;
        Ok::<_, String>(about.is_file().then_some(LocalFile { name, path, bytes: about.len() }))
    };
    if !path.is_dir() {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        return Ok(about(name, path.into())?.into_iter().collect());
    }
    let wanted: BTreeSet<String> = match what {
        What::Model if !weights => BTreeSet::from([CONFIGURATION.to_string()]),
        What::Model => match hub::of_model(path) {
            Ok(files) => files.into_iter().collect(),
            Err(HubError::Repo { problem, remedy, .. }) => return Err(format!("{problem}; {remedy}")),
            Err(error) => return Err(error.to_string()),
        },
        What::Rows | What::Adapter | What::Documents => {
            let mut names = BTreeSet::new();
            for entry in std::fs::read_dir(path).map_err(|error| unreadable(path, &error))? {
                let name = entry.map_err(|error| unreadable(path, &error))?.file_name();
                names.extend(name.into_string().ok().filter(|name| is_read(name, what)));
            }
            names
        }
    };
    let mut files = Vec::new();
    for name in wanted {
        let at = path.join(&name);
        files.extend(about(name, at)?);
    }
    match files.is_empty() {
        true => Err(format!("{} has no file that is read of it", path.display())),
        false => Ok(files),
    }
}

/// Whether a file of a directory of rows, or of an adapter, is read.
fn is_read(name: &str, what: What) -> bool {
    let lower = name.to_ascii_lowercase();
    !name.starts_with('.')
        && match what {
            What::Adapter => name.starts_with(ADAPTER),
            What::Documents if lower.ends_with(TEXT) => true,
            What::Rows | What::Model | What::Documents => ROWS.iter().any(|end| lower.ends_with(end)),
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is read of a directory is uploaded, and nothing else of it.
    #[test]
    fn the_files_that_are_read_are_uploaded() {
        let dir = tempfile::tempdir().unwrap();
        let names = |dir: &Path, what| {
            files(dir, what, true).map(|files| files.into_iter().map(|file| file.name).collect::<Vec<_>>())
        };
        let at = dir.path();
        for name in [
            "config.json",
            "model.safetensors",
            "pytorch_model.bin",
            "tokenizer.json",
            "README.md",
            ".secret.json",
            "train.jsonl",
            "test.Parquet",
            "notes.txt",
            "adapter_config.json",
            "adapter_model.safetensors",
            "optimizer.pt",
        ] {
            std::fs::write(at.join(name), name).unwrap();
        }
        std::fs::create_dir(at.join("below.json")).unwrap();
        std::fs::write(at.join("below.json/more.jsonl"), "").unwrap();
        assert_eq!(names(at, What::Model).unwrap(), ["config.json", "model.safetensors", "tokenizer.json"]);
        assert_eq!(names(at, What::Adapter).unwrap(), ["adapter_config.json", "adapter_model.safetensors"]);
        assert_eq!(
            names(at, What::Rows).unwrap(),
            ["adapter_config.json", "config.json", "test.Parquet", "tokenizer.json", "train.jsonl"]
        );
        let outline = files(at, What::Model, false).unwrap();
        assert_eq!(outline.iter().map(|file| &file.name[..]).collect::<Vec<_>>(), ["config.json"]);
        // As they are named, whatever they are called.
        assert_eq!(names(&at.join("notes.txt"), What::Rows).unwrap(), ["notes.txt"]);
        let empty = at.join("empty");
        std::fs::create_dir(&empty).unwrap();
        for (what, problem) in [
            (What::Model, "no config.json"),
            (What::Rows, "no file that is read"),
            (What::Adapter, "no file"),
        ] {
            assert!(names(&empty, what).unwrap_err().contains(problem), "{what:?}");
        }
        assert!(names(&at.join("gone"), What::Rows).unwrap_err().contains("cannot be read"));
    }

    #[test]
    fn what_is_here_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let rows = dir.path().join("rows.jsonl");
        std::fs::write(&rows, "").unwrap();
        std::fs::create_dir(dir.path().join(".hidden")).unwrap();
        let found = |name: &Path, place| {
            let (at, name) = ("dataset_name".into(), name.to_string_lossy().into_owned());
            Local::find(Named { at, name, what: What::Rows, place })
                .map(|local| (local.called, local.is_directory))
        };
        assert_eq!(found(&rows, Place::Path), Some(("rows.jsonl".into(), false)));
        assert_eq!(found(&dir.path().join(".hidden"), Place::Path), Some(("data".into(), true)));
        assert_eq!(found(Path::new("/"), Place::Path), Some(("data".into(), true)));
        assert_eq!(found(&rows, Place::Hub), None);
        assert_eq!(found(&dir.path().join("gone"), Place::Path), None);
        assert_eq!(found(Path::new("src"), Place::Path), None, "an adapter of another machine");
    }
}
