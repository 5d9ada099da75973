//! Uploaded data.

use super::ConvertError;
use crate::v1;
use domain::data::{ContentHash, Tree, TreeFile};

/// A hash as its bytes.
pub fn hash(hash: ContentHash) -> Vec<u8> {
    hash.0.to_vec()
}

/// The hash that a field holds.
pub fn to_hash(field: &'static str, bytes: &[u8]) -> Result<ContentHash, ConvertError> {
    let wrong = || ConvertError::new(field, format!("has {} bytes, and a SHA-256 has 32", bytes.len()));
    bytes.try_into().map(ContentHash).map_err(|_| wrong())
}

/// A tree's files.
pub fn files(tree: &Tree) -> Vec<v1::DataFile> {
    let file = |file: &TreeFile| v1::DataFile {
        name: file.name.clone(),
        bytes: file.bytes,
        sha256: hash(file.sha256),
    };
    tree.files().iter().map(file).collect()
}

/// The tree of these files.
pub fn to_tree(files: Vec<v1::DataFile>) -> Result<Tree, ConvertError> {
    let file = |file: v1::DataFile| {
        let sha256 = to_hash("files.sha256", &file.sha256)?;
        Ok(TreeFile { name: file.name, bytes: file.bytes, sha256 })
    };
    let files = files.into_iter().map(file).collect::<Result<_, ConvertError>>()?;
    Tree::new(files).map_err(|error| ConvertError::new("files", error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trees_come_back_and_wrong_ones_are_named() {
        let file =
            |name: &str, sha256: &[u8]| v1::DataFile { name: name.into(), bytes: 3, sha256: sha256.into() };
        let whole = vec![file("a.jsonl", &[1; 32]), file("b.jsonl", &[2; 32])];
        assert_eq!(files(&to_tree(whole.clone()).unwrap()), whole);
        for (wrong, field, problem) in [
            (vec![file("a", &[1; 31])], "files.sha256", "has 31 bytes"),
            (vec![file("../a", &[1; 32])], "files", "rename it"),
            (vec![file("a", &[1; 32]), file("a", &[2; 32])], "files", "there twice"),
            (vec![], "files", "no file"),
        ] {
            let error = to_tree(wrong).unwrap_err();
            assert!(error.field == field && error.problem.contains(problem), "{error}");
        }
    }
}
