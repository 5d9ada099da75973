//! Uploaded data: named by what it holds, so that a name means the same bytes on every machine.
//!
//! What a submitter uploads is a [`Tree`]: the files of a directory, or one file. Its id is the SHA-256 of the text that
//! lists them. A sweep names it by a [`Reference`], which is neither a path nor an id of the hub.

use crate::sweep::Evaluations;
use crate::trial::TrialConfig;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Files of a tree. Its list is one message on the wire.
pub const MOST_FILES: usize = 1000;

/// Bytes of a tree: a TiB.
pub const MOST_BYTES: u64 = 1 << 40;

/// Bytes of a file's name, as file systems have it.
const NAME_BYTES: usize = 255;

/// What every reference begins with. No path and no id of the hub does: a file called so is `./blob:…`.
const SCHEME: &str = "blob:";

/// The hash that names what is uploaded.
const HASH: &str = "sha256:";

/// The first line of a tree's text: what it is, and the version of its form.
const HEADING: &str = "lorafleet tree 1";

/// A SHA-256. As text, 64 hexadecimal digits in lower case.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContentHash(pub [u8; 32]);

impl ContentHash {
    /// Of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }
}

impl fmt::Display for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for ContentHash {
    type Err = DataError;

    fn from_str(text: &str) -> Result<Self, DataError> {
        let wrong = || DataError::Hash(text.into());
        let digit = |b: &u8| b.is_ascii_digit() || (b'a'..=b'f').contains(b);
        if text.len() != 64 || !text.as_bytes().iter().all(digit) {
            return Err(wrong());
        }
        let mut bytes = [0; 32];
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).map_err(|_| wrong())?;
        }
        Ok(Self(bytes))
    }
}

/// What cannot be uploaded, or is no name of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DataError {
    /// A text is no SHA-256.
    #[error("`{0}` is no SHA-256: it has 64 digits, of 0 to 9 and a to f")]
    Hash(String),
    /// A file's name could lie elsewhere, hide, or break a line.
    #[error(
        "{0:?} cannot be an uploaded file's name: it has at most {NAME_BYTES} bytes, no slash or control character, \
         and no dot in front; rename it"
    )]
    Name(String),
    /// Two files have the same name.
    #[error("the file {0:?} is there twice")]
    Duplicate(String),
    /// There is nothing.
    #[error("there is no file to upload")]
    Empty,
    /// Too many files.
    #[error("{0} files are too many to upload together: at most {MOST_FILES}")]
    TooMany(usize),
    /// Too many bytes.
    #[error("more than {MOST_BYTES} bytes are too many to upload together")]
    TooLarge,
    /// A text is no tree's.
    #[error("line {line}: is no list of uploaded files")]
    Text {
        /// The line, from 1.
        line: usize,
    },
    /// A text is no reference.
    #[error("`{0}` names no uploaded data: write blob:sha256:<64 digits>/<name>, as `lorafleet submit` does")]
    Reference(String),
}

/// A file of a tree.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct TreeFile {
    /// Its name, without folders.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// Its SHA-256.
    pub sha256: ContentHash,
}

/// The files of a directory, or one file. None lies in a folder of the directory: nothing that trains reads those.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree(Vec<TreeFile>);

impl Tree {
    /// A tree of these files, in the order of their names.
    ///
    /// # Errors
    /// A name is not allowed or there twice, or they are none or too many.
    pub fn new(mut files: Vec<TreeFile>) -> Result<Self, DataError> {
        files.sort();
        if files.is_empty() {
            return Err(DataError::Empty);
        }
        if files.len() > MOST_FILES {
            return Err(DataError::TooMany(files.len()));
        }
        if let Some(wrong) = files.iter().find(|file| !is_name(&file.name)) {
            return Err(DataError::Name(wrong.name.clone()));
        }
        if let Some(twice) = files.windows(2).find(|pair| pair[0].name == pair[1].name) {
            return Err(DataError::Duplicate(twice[0].name.clone()));
        }
        let bytes = files.iter().try_fold(0_u64, |sum, file| sum.checked_add(file.bytes));
        match bytes {
            Some(..=MOST_BYTES) => Ok(Self(files)),
            _ => Err(DataError::TooLarge),
        }
    }

    /// Its files, in the order of their names.
    pub fn files(&self) -> &[TreeFile] {
        &self.0
    }

    /// Bytes of all its files.
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(|file| file.bytes).sum()
    }

    /// Its text: a heading, then a line a file with its SHA-256, its length and its name.
    pub fn text(&self) -> String {
        let line = |file: &TreeFile| format!("{} {} {}\n", file.sha256, file.bytes, file.name);
        format!("{HEADING}\n{}", self.0.iter().map(line).collect::<String>())
    }

    /// Reads what [`Tree::text`] wrote, and nothing else: a text that is read has the id of its tree.
    ///
    /// # Errors
    /// It is no such text.
    pub fn parse(text: &str) -> Result<Self, DataError> {
        let wrong = |line: usize| DataError::Text { line: line + 1 };
        let mut lines = text.split_terminator('\n').enumerate();
        if lines.next().map(|(_, heading)| heading) != Some(HEADING) {
            return Err(wrong(0));
        }
        let file = |(i, line): (usize, &str)| {
            let mut parts = line.splitn(3, ' ');
            let (Some(sha256), Some(bytes), Some(name)) = (parts.next(), parts.next(), parts.next()) else {
                return Err(wrong(i));
            };
            let (sha256, bytes) = (sha256.parse()?, bytes.parse().map_err(|_| wrong(i))?);
            Ok(TreeFile { name: name.into(), bytes, sha256 })
        };
        let tree = Self::new(lines.map(file).collect::<Result<_, _>>()?)?;
        if tree.text() == text { Ok(tree) } else { Err(wrong(0)) }
    }

    /// What names it.
    pub fn id(&self) -> ContentHash {
        ContentHash::of(self.text().as_bytes())
    }
}

/// Whether a file of a tree may have a name.
fn is_name(name: &str) -> bool {
    let fits = |c: char| !c.is_control() && c != '/' && c != '\\';
    !name.is_empty() && name.len() <= NAME_BYTES && !name.starts_with('.') && name.chars().all(fits)
}

/// How a sweep names uploaded data: `blob:sha256:<tree>/<name>`, with a slash at the end if it is a directory. The
/// name is the one that the submitter has for it, for people; of a file it is also the tree's one file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    /// The tree.
    pub tree: ContentHash,
    /// What the submitter calls it.
    pub name: String,
    /// Whether all of the tree is meant, as a directory.
    pub is_directory: bool,
}

impl Reference {
    /// Whether a text is meant as a reference; it may be a wrong one.
    pub fn is_meant(text: &str) -> bool {
        text.starts_with(SCHEME)
    }

    /// Whether a tree is of its kind: a file's has that one file.
    pub fn fits(&self, tree: &Tree) -> bool {
        self.is_directory || matches!(tree.files(), [file] if file.name == self.name)
    }

    /// What it means where the tree's files lie in `dir`.
    pub fn within(&self, dir: &Path) -> PathBuf {
        if self.is_directory { dir.into() } else { dir.join(&self.name) }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = if self.is_directory { "/" } else { "" };
        write!(f, "{SCHEME}{HASH}{}/{}{end}", self.tree, self.name)
    }
}

impl FromStr for Reference {
    type Err = DataError;

    fn from_str(text: &str) -> Result<Self, DataError> {
        let wrong = || DataError::Reference(text.into());
        let rest = text.strip_prefix(SCHEME).and_then(|rest| rest.strip_prefix(HASH));
        let (tree, name) = rest.and_then(|rest| rest.split_once('/')).ok_or_else(wrong)?;
        let (name, is_directory) = name.strip_suffix('/').map_or((name, false), |name| (name, true));
        match tree.parse() {
            Ok(tree) if is_name(name) => Ok(Self { tree, name: name.into(), is_directory }),
            _ => Err(wrong()),
        }
    }
}

/// The uploaded data that a trial, and what its sweep asks of it, name; what is named twice is there twice.
pub fn uploaded(config: &TrialConfig, evaluations: Option<&Evaluations>) -> Vec<Reference> {
    let mut config = config.clone();
    let asked = evaluations.into_iter().flat_map(Evaluations::sources);
    let names = config.sources_mut().map(|name| &*name).chain(asked);
    names.filter_map(|name| name.parse().ok()).collect()
}

/// A model, an adapter or rows as people read it: of uploaded data its name and the beginning of its hash, of
/// everything else what the sweep says.
pub fn shown(name: &str) -> String {
    match name.parse::<Reference>() {
        Ok(reference) => {
            let hash = reference.tree.to_string();
            format!("{} (uploaded, {HASH}{}…)", reference.name, &hash[..12])
        }
        Err(_) => name.into(),
    }
}

/// Serialised as the text.
impl Serialize for ContentHash {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ContentHash {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(name: &str) -> TreeFile {
        TreeFile { name: name.into(), bytes: name.len() as u64, sha256: ContentHash::of(name.as_bytes()) }
    }

    fn tree(names: &[&str]) -> Result<Tree, DataError> {
        Tree::new(names.iter().map(|name| file(name)).collect())
    }

    #[test]
    fn a_tree_is_its_files_whatever_their_order() {
        let (one, other) = (tree(&["b", "a.json"]).unwrap(), tree(&["a.json", "b"]).unwrap());
        assert_eq!((one.id(), one.bytes()), (other.id(), 7));
        assert_ne!(one.id(), tree(&["b", "a.jsonl"]).unwrap().id());
        // Fixed for ever: what is stored and cached is found by it.
        assert_eq!(
            tree(&["rows.jsonl"]).unwrap().text(),
            format!("lorafleet tree 1\n{} 10 rows.jsonl\n", ContentHash::of(b"rows.jsonl"))
        );
    }

    #[test]
    fn names_that_could_lie_elsewhere_are_refused() {
        for name in ["model.safetensors", "my rows.jsonl", "é", "a..b", "blob:x", "-", &"x".repeat(255)] {
            assert!(tree(&[name]).is_ok(), "{name:?}");
        }
        for name in [
            "",
            ".",
            "..",
            "../x",
            "/etc/passwd",
            "a/b",
            "a\\b",
            ".hidden",
            "a\nb",
            "a\0",
            "a\r",
            "\u{85}",
            &"x".repeat(256),
        ] {
            assert_eq!(tree(&[name]), Err(DataError::Name(name.into())));
        }
        assert_eq!(tree(&[]), Err(DataError::Empty));
        assert_eq!(tree(&["a", "b", "a"]), Err(DataError::Duplicate("a".into())));
        let many: Vec<_> = (0..=MOST_FILES).map(|i| file(&i.to_string())).collect();
        assert_eq!(Tree::new(many), Err(DataError::TooMany(MOST_FILES + 1)));
        for bytes in [MOST_BYTES, u64::MAX] {
            let large = |name| TreeFile { bytes, ..file(name) };
            assert_eq!(Tree::new(vec![large("a"), large("b")]), Err(DataError::TooLarge));
        }
    }

    #[test]
    fn texts_that_are_no_trees() {
        let hash = ContentHash::of(b"");
        for text in [
            String::new(),
            "lorafleet tree 2\n".into(),
            "lorafleet tree 1\n".into(),
            format!("lorafleet tree 1\n{hash} 0 b\n{hash} 0 a\n"),
            format!("lorafleet tree 1\n{hash} 0 a"),
            format!("lorafleet tree 1\n{hash} 00 a\n"),
            format!("lorafleet tree 1\n{hash} 0 a\n\n"),
            format!("lorafleet tree 1\n{hash} -1 a\n"),
            format!("lorafleet tree 1\n{hash} 0 ../a\n"),
            format!("lorafleet tree 1\nx{hash} 0 a\n"),
        ] {
            assert!(Tree::parse(&text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn references() {
        let hash = ContentHash::of(b"x");
        for (text, name, is_directory) in [
            (format!("blob:sha256:{hash}/rows.jsonl"), "rows.jsonl", false),
            (format!("blob:sha256:{hash}/base/"), "base", true),
            (format!("blob:sha256:{hash}/my rows.jsonl"), "my rows.jsonl", false),
        ] {
            let reference: Reference = text.parse().unwrap();
            assert_eq!(reference, Reference { tree: hash, name: name.into(), is_directory });
            assert!(reference.to_string() == text && Reference::is_meant(&text));
            assert_eq!(shown(&text), format!("{name} (uploaded, sha256:2d711642b726…)"));
        }
        for text in [
            "".into(),
            "blob:".into(),
            format!("blob:sha256:{hash}"),
            format!("blob:sha256:{hash}/"),
            format!("blob:sha256:{hash}//"),
            format!("blob:sha256:{hash}/../x"),
            format!("blob:sha256:{hash}/a/b"),
            format!("blob:sha256:{hash}/.."),
            format!("blob:sha256:{}/x", hash.to_string().to_uppercase()),
            format!("blob:sha512:{hash}/x"),
            format!("blob:sha256:{}/x", "é".repeat(32)),
            "org/name".into(),
        ] {
            assert!(text.parse::<Reference>().is_err(), "{text}");
            assert_eq!(shown(&text), text);
        }
        let rows = Reference { tree: hash, name: "rows.jsonl".into(), is_directory: false };
        let all = Reference { name: "base".into(), is_directory: true, ..rows.clone() };
        for (names, of_file) in
            [(&["rows.jsonl"][..], true), (&["other.jsonl"], false), (&["rows.jsonl", "x"], false)]
        {
            let tree = tree(names).unwrap();
            assert!(rows.fits(&tree) == of_file && all.fits(&tree), "{names:?}");
        }
        assert_eq!(rows.within(Path::new("/c")), Path::new("/c/rows.jsonl"));
        assert_eq!(all.within(Path::new("/c")), Path::new("/c"));
    }

    proptest! {
        #[test]
        fn a_tree_reads_back(names in proptest::collection::btree_set("[^/\\\\.\\p{C}][^/\\\\\\p{C}]{0,20}", 1..9)) {
            let names: Vec<_> = names.iter().map(String::as_str).collect();
            let tree = tree(&names).unwrap();
            let read = Tree::parse(&tree.text()).unwrap();
            prop_assert_eq!(read.id(), tree.id());
            prop_assert_eq!(read, tree);
        }

        #[test]
        fn any_text_is_read_or_refused(text in "(lorafleet tree 1\n)?([0-9a-f]{64} [0-9]{1,21} [a-z/.]{0,4}\n?){0,3}") {
            if let Ok(tree) = Tree::parse(&text) {
                prop_assert_eq!(tree.text(), text);
            }
        }
    }
}
