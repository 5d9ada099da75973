//! The files of a user's own configuration: `$XDG_CONFIG_HOME/lorafleet`, else `~/.config/lorafleet`.

use std::io::Write;
use std::path::{Path, PathBuf};

/// Where a file of that name lies; `None` without a home.
pub(crate) fn path(name: &str) -> Option<PathBuf> {
    let given = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let config = given("XDG_CONFIG_HOME").or_else(|| Some(given("HOME")?.join(".config")))?;
    Some(config.join("lorafleet").join(name))
}

/// Writes a file, whole or not at all.
pub(crate) fn write(path: &Path, text: &str) -> std::io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(dir)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let draft = dir.join(format!(".{name}.{}", std::process::id()));
    let mut file = std::fs::File::create(&draft)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all())?;
    std::fs::rename(&draft, path)
}
