//! The page's files. They are in the binary, and a browser keeps them for as long as they are the same.

use super::answer;
use flate2::Compression;
use flate2::write::GzEncoder;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::Write as _;
use tonic::body::Body;
use tonic::codegen::Bytes;
use tonic::codegen::http::header::{self, HeaderMap, HeaderValue};
use tonic::codegen::http::{Response, StatusCode};

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const TEXT: &str = "text/plain; charset=utf-8";
const SVG: &str = "image/svg+xml";

macro_rules! files {
    ($( $path:literal = $file:literal, $kind:ident; )*) => {
        /// Each file's path, kind and bytes.
        pub const FILES: &[(&str, &str, &[u8])] =
            &[ $( ($path, $kind, include_bytes!(concat!("assets/", $file))), )* ];
    };
}

files! {
    "/" = "index.html", HTML;
    "/assets/page.css" = "page.css", CSS;
    "/assets/icon.svg" = "icon.svg", SVG;
    "/assets/main.js" = "main.js", SCRIPT;
    "/assets/server.js" = "server.js", SCRIPT;
    "/assets/show.js" = "show.js", SCRIPT;
    "/assets/sweep.js" = "sweep.js", SCRIPT;
    "/assets/table.js" = "table.js", SCRIPT;
    "/assets/trial.js" = "trial.js", SCRIPT;
    "/assets/charts.js" = "charts.js", SCRIPT;
    "/assets/timeline.js" = "timeline.js", SCRIPT;
    "/assets/agents.js" = "agents.js", SCRIPT;
    "/assets/vendor/uPlot.iife.min.js" = "vendor/uPlot.iife.min.js", SCRIPT;
    "/assets/vendor/uPlot.min.css" = "vendor/uPlot.min.css", CSS;
    "/assets/vendor/uPlot.LICENSE" = "vendor/uPlot.LICENSE", TEXT;
}

/// The files as they are sent.
pub struct Assets(HashMap<&'static str, Asset>);

struct Asset {
    kind: &'static str,
    plain: Bytes,
    zipped: Bytes,
    /// What it holds, by a hash.
    tag: HeaderValue,
}

impl Assets {
    /// All of them, compressed once.
    pub fn new() -> Self {
        Self(FILES.iter().map(|(path, kind, bytes)| (*path, Asset::new(kind, bytes))).collect())
    }

    /// The file of a path, or that the asking browser has it; `None`: there is none of that path.
    pub fn answer(&self, path: &str, headers: &HeaderMap) -> Option<Response<Body>> {
        let asset = self.0.get(path)?;
        let zipped = super::accepts_gzip(headers);
        let known = headers.get(header::IF_NONE_MATCH) == Some(&asset.tag);
        let mut answer = match (known, zipped) {
            (true, _) => answer(StatusCode::NOT_MODIFIED, asset.kind, Bytes::new()),
            (false, true) => answer(StatusCode::OK, asset.kind, asset.zipped.clone()),
            (false, false) => answer(StatusCode::OK, asset.kind, asset.plain.clone()),
        };
        let headers = answer.headers_mut();
        if zipped && !known {
            headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        }
        headers.insert(header::ETAG, asset.tag.clone());
        headers.insert(header::VARY, HeaderValue::from_static("accept-encoding"));
        // Another version of the program has others at the same paths.
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        Some(answer)
    }
}

impl Default for Assets {
    fn default() -> Self {
        Self::new()
    }
}

impl Asset {
    fn new(kind: &'static str, plain: &'static [u8]) -> Self {
        let mut zip = GzEncoder::new(Vec::new(), Compression::best());
        // A vector takes whatever is written to it.
        let zipped = zip.write_all(plain).and_then(|()| zip.finish()).unwrap_or_default();
        let mut tag = String::from("\"");
        for byte in Sha256::digest(plain).iter().take(16) {
            let _ = write!(tag, "{byte:02x}");
        }
        tag.push('"');
        let tag = HeaderValue::try_from(tag).unwrap_or(HeaderValue::from_static("\"\""));
        Self { kind, plain: Bytes::from_static(plain), zipped: zipped.into(), tag }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that a browser loads before it asks for data, at most.
    const MOST: usize = 300_000;

    #[test]
    fn the_files_are_small_and_ask_nobody_else() {
        let assets = Assets::new();
        let plain: usize = assets.0.values().map(|asset| asset.plain.len()).sum();
        let zipped: usize = assets.0.values().map(|asset| asset.zipped.len()).sum();
        assert!(plain < MOST && zipped < plain / 2, "{plain} bytes, {zipped} zipped");
        for (path, kind, bytes) in FILES {
            let text = std::str::from_utf8(bytes).unwrap();
            let ours = !path.contains("vendor");
            // An SVG names its namespace so.
            let outside = text.replace("http://www.w3.org/", "").contains("://");
            assert!(!(ours && outside), "{path} names an address outside");
            let inline = ["<script>", "style=\"", "onclick="].iter().any(|inline| text.contains(inline));
            assert!(!(*kind == HTML && inline), "{path}: the page's policy forbids scripts and styles in it");
        }
    }

    #[test]
    fn every_file_that_the_page_names_is_there() {
        let here: Vec<_> = FILES.iter().map(|(path, _, _)| *path).collect();
        for (path, _, bytes) in FILES.iter().filter(|(path, _, _)| !path.contains("vendor")) {
            let text = std::str::from_utf8(bytes).unwrap();
            let relative = text
                .split(['"', '\''])
                .filter(|word| word.starts_with("./") && (word.ends_with(".js") || word.ends_with(".css")));
            let absolute = text.split(['"', '\'']).filter(|word| word.starts_with("/assets/"));
            let named =
                absolute.map(str::to_string).chain(relative.map(|word| word.replacen("./", "/assets/", 1)));
            for name in named {
                assert!(here.contains(&name.as_str()), "{path} names {name}");
            }
        }
    }
}
