//! The cache against a coordinator that cuts, lies and counts.

use super::*;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of a message.
const MESSAGE: usize = 10;

/// What was uploaded, and what was asked for.
#[derive(Default)]
struct Uploaded {
    trees: HashMap<ContentHash, Tree>,
    files: HashMap<ContentHash, Vec<u8>>,
    asked: Mutex<Vec<(ContentHash, u64)>>,
    /// Bytes after which the next downloads are cut off, each once.
    cuts: Mutex<Vec<usize>>,
    /// Whether other bytes come than were uploaded.
    lies: Mutex<bool>,
    /// Whether nothing comes after the first message of a download.
    stalls: Mutex<bool>,
}

impl Uploaded {
    fn add(&mut self, files: &[(&str, usize)]) -> ContentHash {
        let file = |(name, length): &(&str, usize)| {
            let data: Vec<u8> = (0..*length).map(|i| (i * name.len()) as u8).collect();
            let sha256 = ContentHash::of(&data);
            self.files.insert(sha256, data);
            TreeFile { name: (*name).into(), bytes: *length as u64, sha256 }
        };
        let tree = Tree::new(files.iter().map(file).collect()).unwrap();
        let id = tree.id();
        self.trees.insert(id, tree);
        id
    }

    fn asked(&self) -> Vec<(ContentHash, u64)> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

impl Source for Uploaded {
    async fn tree(&self, id: ContentHash) -> Result<Option<Tree>, TransferError> {
        Ok(self.trees.get(&id).cloned())
    }

    async fn file(
        &self,
        file: ContentHash,
        offset: u64,
    ) -> Result<BoxStream<'static, Result<Bytes, TransferError>>, TransferError> {
        let stalls = *self.stalls.lock().unwrap();
        self.asked.lock().unwrap().push((file, offset));
        // Whoever else wants it comes in between.
        tokio::task::yield_now().await;
        let mut data = self.files[&file][offset as usize..].to_vec();
        if *self.lies.lock().unwrap() {
            data.iter_mut().for_each(|byte| *byte = !*byte);
        }
        let cut = self.cuts.lock().unwrap().pop();
        data.truncate(cut.unwrap_or(data.len()));
        let mut pieces: Vec<_> =
            data.chunks(MESSAGE).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
        if cut.is_some() {
            pieces.push(Err(TransferError::Later("cut".into())));
        }
        match stalls {
            true => Ok(futures::stream::iter(pieces.into_iter().take(1))
                .chain(futures::stream::pending())
                .boxed()),
            false => Ok(futures::stream::iter(pieces).boxed()),
        }
    }
}

/// A clock on which each look is a millisecond later.
#[derive(Default)]
struct Ticking(AtomicU64);

impl Clock for Ticking {
    fn now(&self) -> Timestamp {
        Timestamp(self.0.fetch_add(1, Ordering::Relaxed))
    }

    fn monotonic(&self) -> std::time::Duration {
        std::time::Duration::ZERO
    }
}

struct Bench {
    dir: tempfile::TempDir,
    clock: Arc<Ticking>,
}

impl Bench {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), clock: Arc::default() }
    }

    fn open(&self, limit: u64) -> Cache {
        Cache::open(self.dir.path(), limit, self.clock.clone()).unwrap()
    }

    /// Trees that lie there whole.
    fn whole(&self) -> Vec<ContentHash> {
        let mut found: Vec<ContentHash> = std::fs::read_dir(self.dir.path())
            .unwrap()
            .map(|entry| entry.unwrap())
            .filter(|entry| entry.path().join("tree").exists())
            .map(|entry| entry.file_name().to_str().unwrap().parse().unwrap())
            .collect();
        found.sort();
        found
    }
}

fn directory(tree: ContentHash) -> Reference {
    Reference { tree, name: "base".into(), is_directory: true }
}

fn rows(tree: ContentHash) -> Reference {
    Reference { tree, name: "rows.jsonl".into(), is_directory: false }
}

#[tokio::test]
async fn what_is_fetched_is_there_for_all() {
    let (bench, mut uploaded) = (Bench::new(), Uploaded::default());
    let base = uploaded.add(&[("config.json", 35), ("empty", 0), ("model.safetensors", 95)]);
    let one = uploaded.add(&[("rows.jsonl", 42)]);
    let cache = bench.open(1000);
    let wanted = directory(base);
    // Three trials at a time: it is fetched once.
    let (a, b, c) = tokio::join!(
        cache.get(&uploaded, &wanted),
        cache.get(&uploaded, &wanted),
        cache.get(&uploaded, &wanted)
    );
    let (a, _, _) = (a.unwrap(), b.unwrap(), c.unwrap());
    assert_eq!(uploaded.asked().len(), 2, "an empty file needs no bytes");
    for file in uploaded.trees[&base].files() {
        let found = std::fs::read(a.path.join(&file.name)).unwrap();
        assert_eq!(found, uploaded.files[&file.sha256], "{}", file.name);
    }
    let file = cache.get(&uploaded, &rows(one)).await.unwrap();
    assert!(file.path.ends_with("rows.jsonl") && file.path.is_file());
    assert_eq!(uploaded.asked().len(), 1);
    // After a restart it is still there.
    drop((a, file, cache));
    bench.open(1000).get(&uploaded, &wanted).await.unwrap();
    assert_eq!(uploaded.asked(), []);
}

#[tokio::test]
async fn what_is_cut_off_is_gone_on_with() {
    let (bench, mut uploaded) = (Bench::new(), Uploaded::default());
    let base = uploaded.add(&[("a", 100), ("b", 100)]);
    *uploaded.cuts.lock().unwrap() = vec![55, 30];
    let first = bench.open(1000).get(&uploaded, &directory(base)).await.unwrap_err();
    assert!(first.failure().is_none(), "{first}: it is worth another try");
    // Another process goes on.
    let cache = bench.open(1000);
    cache.get(&uploaded, &directory(base)).await.unwrap_err();
    assert_eq!(bench.whole(), []);
    let pinned = cache.get(&uploaded, &directory(base)).await.unwrap();
    let offsets: Vec<_> = uploaded.asked().into_iter().map(|(_, offset)| offset).collect();
    assert_eq!(offsets, [0, 30, 85, 0]);
    for file in uploaded.trees[&base].files() {
        assert_eq!(std::fs::read(pinned.path.join(&file.name)).unwrap(), uploaded.files[&file.sha256]);
    }
    assert!(std::fs::read_dir(pinned.path.parent().unwrap()).unwrap().count() == 2, "no part is left");
}

#[tokio::test]
async fn other_bytes_are_never_used() {
    let (bench, mut uploaded) = (Bench::new(), Uploaded::default());
    let one = uploaded.add(&[("rows.jsonl", 42)]);
    let cache = bench.open(1000);
    *uploaded.lies.lock().unwrap() = true;
    let error = cache.get(&uploaded, &rows(one)).await.unwrap_err();
    // The coordinator's are wrong, and another may have the right ones.
    let failure = error.failure().unwrap();
    assert!(
        failure.class == FailureClass::Infrastructure && failure.message.contains("other bytes"),
        "{error}"
    );
    *uploaded.lies.lock().unwrap() = false;
    uploaded.asked();
    let path = cache.get(&uploaded, &rows(one)).await.unwrap().path.clone();
    assert_eq!(
        uploaded.asked(),
        [(ContentHash::of(&std::fs::read(&path).unwrap()), 0)],
        "from its beginning"
    );

    let right = std::fs::read(&path).unwrap();
    let damage = |bytes: &[u8], at: u64| {
        std::fs::write(&path, bytes).unwrap();
        let time = std::time::UNIX_EPOCH + std::time::Duration::from_millis(at);
        std::fs::File::options().append(true).open(&path).unwrap().set_modified(time).unwrap();
    };
    // Of another length, of another time, and after a restart with nothing that shows.
    for (bytes, restarts) in [(&right[1..], false), (&[0; 42][..], false), (&[1; 42][..], true)] {
        damage(bytes, 5);
        let cache = if restarts { bench.open(1000) } else { cache.clone() };
        cache.get(&uploaded, &rows(one)).await.unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), right);
        assert_eq!(uploaded.asked().len(), 1);
    }
    // Written again with the same bytes, it is looked at and stays.
    damage(&right, 7);
    cache.get(&uploaded, &rows(one)).await.unwrap();
    std::fs::remove_file(&path).unwrap();
    assert_eq!(uploaded.asked(), []);
    cache.get(&uploaded, &rows(one)).await.unwrap();
    assert_eq!(uploaded.asked().len(), 1);
}

#[tokio::test]
async fn what_was_not_used_for_longest_goes_and_nothing_that_is_in_use() {
    let (bench, mut uploaded) = (Bench::new(), Uploaded::default());
    let [a, b, c, d] = ["a", "bb", "ccc", "dddd"].map(|name| uploaded.add(&[(name, 40)]));
    let huge = uploaded.add(&[("e", 101)]);
    let cache = bench.open(100);
    let get = async |cache: &Cache, tree| cache.get(&uploaded, &directory(tree)).await;
    let sorted = |mut trees: Vec<ContentHash>| {
        trees.sort();
        trees
    };
    get(&cache, a).await.unwrap();
    get(&cache, b).await.unwrap();
    get(&cache, a).await.unwrap();
    get(&cache, c).await.unwrap();
    assert_eq!(bench.whole(), sorted(vec![a, c]), "b was not used for longest");
    let (of_a, of_c) = (get(&cache, a).await.unwrap(), get(&cache, c).await.unwrap());
    let full = get(&cache, d).await.unwrap_err();
    assert!(matches!(full, CacheError::Full { bytes: 40, limit: 100 }) && full.failure().is_none(), "{full}");
    let large = get(&cache, huge).await.unwrap_err();
    let failure = large.failure().unwrap();
    assert_eq!(failure.class, FailureClass::Infrastructure, "another agent may have the room");
    assert!(failure.message.contains("--cache-limit"), "{}", failure.message);
    assert_eq!(bench.whole(), sorted(vec![a, c]));
    // Of one that itself holds what is in the way, it is said what it needs.
    let (tree, bytes) = (of_a.tree(), of_a.bytes() + of_c.bytes());
    assert_eq!((tree, bytes), (a, 80));
    let own = get(&cache, d).await.unwrap_err().beside(&directory(d), bytes).failure().unwrap();
    assert!(own.message.contains("120 bytes") && own.message.contains("--cache-limit"), "{}", own.message);
    assert!(
        get(&cache, d).await.unwrap_err().beside(&directory(d), 40).failure().is_none(),
        "others hold the rest"
    );
    drop(of_a);
    get(&cache, d).await.unwrap();
    assert_eq!(bench.whole(), sorted(vec![c, d]));
    // A restart keeps the order of use, and a smaller limit holds from the start.
    drop((of_c, cache));
    let cache = bench.open(100);
    get(&cache, c).await.unwrap();
    drop(cache);
    bench.open(50);
    assert_eq!(bench.whole(), [c]);
    let left: Vec<_> = std::fs::read_dir(bench.dir.path()).unwrap().collect();
    assert_eq!(left.len(), 1, "what was removed is gone");
}

#[tokio::test]
async fn what_was_never_uploaded_is_the_submitters_fault() {
    let (bench, mut uploaded) = (Bench::new(), Uploaded::default());
    let pair = uploaded.add(&[("rows.jsonl", 1), ("b", 2)]);
    let other = uploaded.add(&[("other.jsonl", 1)]);
    let cache = bench.open(1000);
    // Not found out by what is in the cache already.
    cache.get(&uploaded, &directory(pair)).await.unwrap();
    for (reference, said) in [
        (rows(ContentHash::of(b"never")), "submit the sweep again"),
        (rows(pair), "no file of that name"),
        (rows(other), "no file of that name"),
    ] {
        let failure = cache.get(&uploaded, &reference).await.unwrap_err().failure().unwrap();
        assert_eq!(failure.class, FailureClass::User, "{reference}");
        assert!(failure.message.contains(said), "{}", failure.message);
    }
}

#[tokio::test]
async fn what_was_fetched_ahead_is_there_for_its_trial() {
    let (bench, mut uploaded) = (Bench::new(), Uploaded::default());
    let [base, gone] = ["a", "bb"].map(|name| uploaded.add(&[(name, 40)]));
    let cache = bench.open(100);
    let wanted = [base, gone].into();
    let ahead = cache.fetch_ahead(&uploaded, &directory(base), &wanted).await.unwrap();
    assert_eq!((ahead, uploaded.asked().len()), (Ahead::Here, 1));
    cache.get(&uploaded, &directory(base)).await.unwrap();
    assert_eq!(uploaded.asked(), []);
    // What cannot be had is no trial's fault yet, and its trial can have it later.
    *uploaded.cuts.lock().unwrap() = vec![5];
    cache.fetch_ahead(&uploaded, &directory(gone), &wanted).await.unwrap_err();
    cache.get(&uploaded, &directory(gone)).await.unwrap();
    let offsets: Vec<_> = uploaded.asked().into_iter().map(|(_, offset)| offset).collect();
    assert_eq!(offsets, [0, 5]);
}

#[tokio::test]
async fn fetching_ahead_removes_nothing_that_is_used_or_wanted() {
    let (bench, mut uploaded) = (Bench::new(), Uploaded::default());
    let [used, wanted, new] = [("a", 40), ("bb", 40), ("ccc", 30)].map(|file| uploaded.add(&[file]));
    let cache = bench.open(100);
    let all = [wanted, new].into();
    cache.fetch_ahead(&uploaded, &directory(wanted), &all).await.unwrap();
    let in_use = cache.get(&uploaded, &directory(used)).await.unwrap();
    let full = cache.fetch_ahead(&uploaded, &directory(new), &all).await.unwrap_err();
    assert!(matches!(full, CacheError::Full { bytes: 30, limit: 100 }), "{full}");
    let mut both = vec![used, wanted];
    both.sort();
    assert_eq!(bench.whole(), both);
    // Although the other was not used for longer.
    drop(in_use);
    cache.fetch_ahead(&uploaded, &directory(new), &all).await.unwrap();
    let mut both = vec![wanted, new];
    both.sort();
    assert_eq!(bench.whole(), both);
    // A trial takes what room it needs.
    let large = uploaded.add(&[("dddd", 100)]);
    cache.get(&uploaded, &directory(large)).await.unwrap();
    assert_eq!(bench.whole(), [large]);
}

/// Also where what is fetched ahead stands still, and takes the room that the trial needs.
#[tokio::test]
async fn a_trials_fetch_goes_first() {
    let (bench, mut uploaded) = (Bench::new(), Uploaded::default());
    let [ahead, trials] = ["a", "bb"].map(|name| uploaded.add(&[(name, 60)]));
    let cache = bench.open(100);
    *uploaded.stalls.lock().unwrap() = true;
    let (wanted, of_ahead) = ([ahead].into(), directory(ahead));
    let fetch_ahead = cache.fetch_ahead(&uploaded, &of_ahead, &wanted);
    let trial = async {
        while uploaded.asked.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
        *uploaded.stalls.lock().unwrap() = false;
        cache.get(&uploaded, &directory(trials)).await.unwrap()
    };
    let (gave_way, in_use) = tokio::join!(fetch_ahead, trial);
    assert_eq!(gave_way.unwrap(), Ahead::GaveWay);
    assert_eq!(bench.whole(), [trials]);
    drop(in_use);
    cache.until_quiet().await;
    // Its own trial waits for it, and it goes on.
    let (ahead_again, _pinned) =
        tokio::join!(cache.fetch_ahead(&uploaded, &of_ahead, &wanted), cache.get(&uploaded, &of_ahead),);
    assert_eq!(ahead_again.unwrap(), Ahead::Here);
    assert_eq!(bench.whole(), [ahead]);
}
