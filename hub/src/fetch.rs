//! A snapshot of a repository: what is missing in the cache is downloaded, resumed where an earlier download
//! stopped, and verified.

use crate::Progress;
use crate::cache::{Folder, list, make_parent};
use crate::client::{Asked, Client, Meta};
use crate::error::{HubError, Result};
use crate::files::{self, Needed};
use crate::id::{Kind, RepoId};
use crate::settings::Settings;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Tries of a file in a row that bring no byte, before the download is given up, and the pause between two.
const TRIES: u32 = 3;
const PAUSE: Duration = Duration::from_secs(1);

/// The hub and its cache on this machine.
#[derive(Debug)]
pub struct Hub {
    settings: Settings,
    client: Client,
}

impl Hub {
    /// A hub as the settings describe it.
    pub fn new(settings: Settings) -> Self {
        let client = Client::new(&settings);
        Self { settings, client }
    }

    /// Where a repository's files lie in the cache, without a word over the network.
    ///
    /// # Errors
    /// They are not there, or not all that are needed.
    pub fn cached(settings: &Settings, kind: Kind, id: &RepoId) -> Result<PathBuf> {
        let missing = |what: String| {
            let noun = kind.noun();
            let problem = format!(
                "is neither a path on this machine nor a {noun} in {}{what}",
                settings.cache.display()
            );
            HubError::repo(
                id,
                problem,
                "correct the name, or download it: `lorafleet plan` does, and so does the hf tool",
            )
        };
        let folder = Folder::new(&settings.cache, kind, id);
        let commit = id.references().iter().find_map(|name| folder.commit(name));
        let commit = commit.ok_or_else(|| missing(String::new()))?;
        let snapshot = folder.snapshot(&commit);
        let there = id.meant(list(&snapshot).map_err(|_| missing(String::new()))?);
        let needed = files::needed(kind, &there)
            .map_err(|(problem, _)| missing(format!(" (what is there of it {problem})")))?;
        for shard in shards(&snapshot, &needed)? {
            if !there.contains(&shard) {
                return Err(missing(format!(" (of what is there, {shard} is missing)")));
            }
        }
        Ok(snapshot.join(needed.folder))
    }

    /// Downloads what is needed of a repository and is not in the cache, and says where it lies. Where the hub cannot be
    /// reached, the cache's state of the revision serves.
    ///
    /// # Errors
    /// The repository cannot be read or does not hold what is needed; the hub cannot be reached and the cache has
    /// no such revision; a file's bytes are not those that the hub names; the system refuses a write.
    pub fn fetch(&self, kind: Kind, id: &RepoId, progress: &mut dyn Progress) -> Result<PathBuf> {
        let cached = || Self::cached(&self.settings, kind, id);
        if self.settings.offline {
            return cached().map_err(|error| match error {
                HubError::Repo { repo, problem, .. } => HubError::Unavailable {
                    repo,
                    problem: problem + ", and HF_HUB_OFFLINE is set",
                    remedy: "correct the name, or unset HF_HUB_OFFLINE and download it".into(),
                },
                other => other,
            });
        }
        if kind == Kind::Model
            && id.is_pinned()
            && let Ok(path) = cached()
        {
            return Ok(path);
        }
        let asked = Asked { kind, id };
        let listing = match self.client.list(asked) {
            Ok(listing) => listing,
            Err(error @ HubError::Unavailable { .. }) => return cached().map_err(|_| error),
            Err(error) => return Err(error),
        };
        let meant = id.meant(listing.files);
        if let (Some(part), true) = (id.folder(), meant.is_empty()) {
            let problem = format!("has no folder {part}, which is the part of it that is asked for");
            return Err(HubError::repo(
                id,
                problem,
                "download what is meant, and name that folder of this machine",
            ));
        }
        let needed =
            files::needed(kind, &meant).map_err(|(problem, remedy)| HubError::repo(id, problem, remedy))?;
        let folder = Folder::new(&self.settings.cache, kind, id);
        let snapshot = folder.snapshot(&listing.commit);
        let mut download =
            Download { client: &self.client, asked, folder: &folder, commit: &listing.commit, progress };
        for file in &needed.files {
            download.file(file)?;
        }
        for shard in shards(&snapshot, &needed)? {
            download.file(&shard)?;
        }
        // Last, so that a revision that is found in the cache is whole.
        folder.point(id.references().first().map_or(id.revision(), String::as_str), &listing.commit)?;
        Ok(snapshot.join(needed.folder))
    }
}

impl Hub {
    /// Downloads a model's `config.json` alone, and says in which folder it lies. The cache does not count as having the
    /// model then.
    ///
    /// # Errors
    /// As [`Hub::fetch`]'s.
    pub fn configuration(&self, id: &RepoId, progress: &mut dyn Progress) -> Result<PathBuf> {
        let kind = Kind::Model;
        if self.settings.offline {
            return Self::cached(&self.settings, kind, id);
        }
        let asked = Asked { kind, id };
        let commit = self.client.list(asked)?.commit;
        let folder = Folder::new(&self.settings.cache, kind, id);
        Download { client: &self.client, asked, folder: &folder, commit: &commit, progress }
            .file(files::CONFIG)?;
        Ok(folder.snapshot(&commit))
    }
}

/// The shards that a snapshot's index names.
fn shards(snapshot: &Path, needed: &Needed) -> Result<Vec<String>> {
    let Some(index) = &needed.index else { return Ok(Vec::new()) };
    let path = snapshot.join(index);
    let bytes = std::fs::read(&path).map_err(HubError::io(&path))?;
    files::shards(&bytes).ok_or_else(|| {
        HubError::repo(path.display(), "is no index of a checkpoint", "remove it and download it again")
    })
}

/// A commit's files on their way into the cache.
struct Download<'a> {
    client: &'a Client,
    asked: Asked<'a>,
    folder: &'a Folder,
    commit: &'a str,
    progress: &'a mut dyn Progress,
}

impl Download<'_> {
    /// Makes a file part of the snapshot, unless it is.
    fn file(&mut self, name: &str) -> Result<()> {
        if self.folder.snapshot(self.commit).join(name).is_file() {
            return Ok(());
        }
        let meta = self.client.head(self.asked, self.commit, name)?;
        let blob = self.folder.blob(&meta.etag);
        if !blob.is_file() {
            self.blob(name, &meta, &blob)?;
        }
        self.folder.link(self.commit, name, &meta.etag)
    }

    fn blob(&mut self, name: &str, meta: &Meta, blob: &Path) -> Result<()> {
        make_parent(blob)?;
        let path = blob.with_file_name(format!("{}.incomplete", meta.etag));
        let mut options = File::options();
        let file = options.read(true).write(true).create(true).truncate(false).open(&path);
        let mut partial = Partial::new(file.map_err(HubError::io(&path))?, path);
        // One process downloads; another that wants the same file finds it whole.
        match partial.file.lock() {
            // Not every network file system has locks; two downloads at once are then their callers' concern.
            Err(error) if error.kind() == std::io::ErrorKind::Unsupported => {}
            locked => locked.map_err(HubError::io(&partial.path))?,
        }
        if blob.is_file() {
            let _ = std::fs::remove_file(&partial.path);
            return Ok(());
        }
        partial.take_up()?;
        if meta.size.is_some_and(|size| partial.length > size) {
            partial.clear()?;
        }
        self.bytes(name, meta, &mut partial)?;
        self.progress.finished();
        self.verify(name, meta, &mut partial)?;
        partial.file.sync_all().map_err(HubError::io(&partial.path))?;
        std::fs::rename(&partial.path, blob).map_err(HubError::io(blob))
    }

    /// Downloads until the file is as long as the hub says.
    fn bytes(&mut self, name: &str, meta: &Meta, partial: &mut Partial) -> Result<()> {
        let mut in_vain = 0;
        // A file without a length is whole when its body ends well.
        while meta.size != Some(partial.length) {
            let before = partial.length;
            match self.once(name, meta, partial) {
                Ok(()) if meta.size.is_none_or(|size| size == partial.length) => return Ok(()),
                // A body that ends early is a connection that broke.
                Ok(()) => {}
                Err(error @ HubError::Unavailable { .. }) => {
                    if partial.length == before && in_vain + 1 >= TRIES {
                        return Err(error);
                    }
                }
                Err(error) => return Err(error),
            }
            in_vain = if partial.length > before { 0 } else { in_vain + 1 };
            if in_vain >= TRIES {
                let problem = format!("the download of {name} stops at byte {}", partial.length);
                return Err(HubError::unavailable(
                    self.asked.id,
                    problem,
                    "try again later; it goes on from there",
                ));
            }
            if in_vain > 0 {
                std::thread::sleep(PAUSE);
            }
        }
        Ok(())
    }

    /// One request for the bytes that are missing.
    fn once(&mut self, name: &str, meta: &Meta, partial: &mut Partial) -> Result<()> {
        let Some(response) = self.client.get(self.asked, self.commit, name, partial.length)? else {
            return partial.clear();
        };
        let range = response.headers().get("content-range").and_then(|range| range.to_str().ok());
        let goes_on = range.is_some_and(|range| range.starts_with(&format!("bytes {}-", partial.length)));
        if partial.length > 0 && !(response.status() == 206 && goes_on) {
            // All of it comes, or another part than was asked for.
            partial.clear()?;
            if response.status() == 206 {
                return Ok(());
            }
        }
        self.progress.file(name, partial.length, meta.size.unwrap_or_default());
        let mut body = response.into_body().into_reader();
        let mut piece = vec![0; 1 << 18];
        loop {
            let read = match body.read(&mut piece) {
                Ok(0) => return Ok(()),
                Ok(read) => read,
                Err(error) => return Err(self.client.failed(self.asked, &ureq::Error::Io(error))),
            };
            if meta.size.is_some_and(|size| partial.length + read as u64 > size) {
                let problem =
                    format!("sends more of {name} than its {} bytes", meta.size.unwrap_or_default());
                partial.clear()?;
                return Err(HubError::repo(self.asked.id, problem, "try again later"));
            }
            partial.write(&piece[..read])?;
            self.progress.bytes(read as u64);
        }
    }

    /// A large file's name is its SHA-256.
    fn verify(&self, name: &str, meta: &Meta, partial: &mut Partial) -> Result<()> {
        if meta.etag.len() != 64 {
            return Ok(());
        }
        let found =
            partial.hasher.clone().finalize().iter().fold(String::new(), |t, b| t + &format!("{b:02x}"));
        if found == meta.etag {
            return Ok(());
        }
        partial.clear()?;
        Err(HubError::repo(
            self.asked.id,
            format!("{name} came with the SHA-256 {found}, not {}", meta.etag),
            "download it again; what came is removed",
        ))
    }
}

/// A file that is not whole yet.
struct Partial {
    file: File,
    path: PathBuf,
    length: u64,
    hasher: Sha256,
}

impl Partial {
    fn new(file: File, path: PathBuf) -> Self {
        Self { file, path, length: 0, hasher: Sha256::new() }
    }

    /// Reads what an earlier download left.
    fn take_up(&mut self) -> Result<()> {
        let mut piece = vec![0; 1 << 20];
        loop {
            match self.file.read(&mut piece).map_err(HubError::io(&self.path))? {
                0 => return Ok(()),
                read => {
                    self.hasher.update(&piece[..read]);
                    self.length += read as u64;
                }
            }
        }
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(HubError::io(&self.path))?;
        self.hasher.update(bytes);
        self.length += bytes.len() as u64;
        Ok(())
    }

    fn clear(&mut self) -> Result<()> {
        self.file
            .set_len(0)
            .and_then(|()| self.file.seek(SeekFrom::Start(0)))
            .map_err(HubError::io(&self.path))?;
        self.length = 0;
        self.hasher = Sha256::new();
        Ok(())
    }
}
