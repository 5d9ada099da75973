//! Bases in 4 bits from the engine's side: read from the agent's cache where they are there, else quantised, offered to the
//! agent, and written beside training once it has room.
//!
//! A thread of its own writes, one tensor at a time, so that the first step waits for nothing. It shares the tensors of the
//! base, and ends before another base is loaded, so that the device need not hold two.

use super::{Admission, Event, FourBits, Happening, Quantising};
use crate::cache::quantised::{self, Draft};
use domain::Clock;
use domain::data::{ContentHash, Reference};
use domain::trial::{Precision, Severity};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use trainer::kept::{Kept, Origin};
use trainer::model::LoadProgress;
use trainer::run::Loaded;
use trainer::{Device, TrainError};

/// What of the base in memory is offered, and what is written.
#[derive(Default)]
pub(super) struct Keeper {
    offered: Option<Offer>,
    writing: Option<Writing>,
}

/// A base that was quantised as it was loaded.
struct Offer {
    cache: PathBuf,
    key: ContentHash,
    origin: Origin,
}

impl Keeper {
    /// Loads the model of a directory for a trial, from the cache if it is there, which the trial's log then says. Answers
    /// also with how it came to be in 4 bits, if its files are in more.
    pub(super) fn load(
        &mut self,
        (dir, precision): (&Path, Precision),
        admission: &Admission,
        (device, clock): (&Device, &dyn Clock),
        emit: &mut dyn FnMut(Event),
    ) -> Result<(Loaded, Option<FourBits>), TrainError> {
        // The writer shares the tensors of the base that goes.
        (self.offered, self.writing) = (None, None);
        let anew = || load_anew(dir, precision, (device, clock));
        let Some(cache) = &admission.cache else { return anew() };
        let named = admission.config.pretrained_model_id.parse::<Reference>().ok();
        let content = named.map(|reference| reference.tree.to_string());
        let Some(origin) = Origin::of(dir, content.as_deref(), precision)? else { return anew() };
        let key = ContentHash::of(origin.text().as_bytes());
        let since = clock.monotonic();
        let kept = quantised::whole(cache, key).unwrap_or_else(|error| {
            tracing::warn!(%error, "the quantised cache cannot be read");
            None
        });
        if let Some(kept) = &kept {
            match Loaded::load_kept(dir, kept, precision, device) {
                Ok(loaded) => {
                    let seconds = clock.monotonic().saturating_sub(since).as_secs_f64();
                    let message = format!("base read from the quantised cache in {seconds:.1} s");
                    let note = Happening::Note(Severity::Info, message);
                    emit(Event::Trial(admission.assignment.clone(), note));
                    emit(Event::Quantised { key, bytes: None });
                    return Ok((loaded, Some(FourBits::Cached)));
                }
                Err(error) => tracing::warn!(%error, "a base in the quantised cache cannot be used"),
            }
        }
        let (loaded, four_bits) = anew()?;
        if kept.is_some() {
            // The files of the model can be read: it was not their fault.
            quantised::spoil(cache, key);
        }
        if origin.is_unchanged() {
            let bytes = Kept::of(&origin, &loaded).bytes();
            self.offered = Some(Offer { cache: cache.clone(), key, origin });
            emit(Event::Quantised { key, bytes: Some(bytes) });
        }
        Ok((loaded, four_bits))
    }

    /// Writes the base in memory to its draft, if it is the one that was offered under that key. A draft that is gone was
    /// for an earlier load of it.
    pub(super) fn keep(&mut self, loaded: &Loaded, draft: Draft) {
        let is_for = |offer: &mut Offer| offer.key == draft.key && draft.data(&offer.cache).exists();
        if let Some(offer) = self.offered.take_if(is_for) {
            self.writing = Writing::start(offer, draft, loaded);
        }
    }
}

/// Loads a model from its own files.
fn load_anew(
    dir: &Path,
    precision: Precision,
    (device, clock): (&Device, &dyn Clock),
) -> Result<(Loaded, Option<FourBits>), TrainError> {
    let mut watch = Watch::default();
    let loaded = Loaded::load_watched(dir, precision, device, &mut |progress| watch.see(progress, clock))?;
    Ok((loaded, watch.seen.map(|(_, quantising)| FourBits::Quantised(quantising))))
}

/// Takes the times of what is quantised as a model is loaded.
#[derive(Default)]
struct Watch {
    /// When, on the monotonic clock, the matrix began that is quantised now.
    since: Duration,
    /// When the first did, and what was seen from then on.
    seen: Option<(Duration, Quantising)>,
}

impl Watch {
    fn see(&mut self, progress: LoadProgress, clock: &dyn Clock) {
        match progress {
            LoadProgress::Read { .. } => {}
            LoadProgress::Quantising => {
                self.since = clock.monotonic();
                let (start, zero) = (clock.now(), Duration::ZERO);
                let first = Quantising { start, took: zero, busy: zero, matrices: 0, bytes: 0 };
                self.seen.get_or_insert((self.since, first));
            }
            LoadProgress::Quantised { bytes } => {
                let Some((first, seen)) = &mut self.seen else { return };
                let now = clock.monotonic();
                seen.took = now.saturating_sub(*first);
                seen.busy += now.saturating_sub(self.since);
                seen.matrices += 1;
                seen.bytes += bytes;
            }
        }
    }
}

/// A thread that writes. Dropped, it ends after the tensor that it is at.
struct Writing {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Writing {
    fn start(Offer { cache, key, origin }: Offer, draft: Draft, loaded: &Loaded) -> Option<Self> {
        let (kept, stop) = (Kept::of(&origin, loaded), Arc::new(AtomicBool::new(false)));
        let (heard, root) = (stop.clone(), cache.clone());
        let write = move || match write(&kept, &root, draft, &heard) {
            Ok(true) => tracing::info!(%key, "a base in 4 bits is kept in the cache"),
            Ok(false) => draft.give_up(&root),
            Err(error) => {
                tracing::warn!(%error, "a base in 4 bits is not kept in the cache");
                draft.give_up(&root);
            }
        };
        match std::thread::Builder::new().name("quantised base".into()).spawn(write) {
            Ok(thread) => Some(Self { stop, thread: Some(thread) }),
            Err(error) => {
                tracing::warn!(%error, "a base in 4 bits is not kept in the cache");
                draft.give_up(&cache);
                None
            }
        }
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // What it could not do it has said.
            let _ = thread.join();
        }
    }
}

/// Whether all of it is in the cache now.
fn write(kept: &Kept, cache: &Path, draft: Draft, stop: &AtomicBool) -> Result<bool, TrainError> {
    let data = draft.data(cache);
    // To be hashed, all of it is read once more: the next base would wait for that.
    if !kept.write(&data, stop)? || stop.load(Ordering::Relaxed) {
        return Ok(false);
    }
    draft.publish(cache).map_err(TrainError::io(&data))?;
    Ok(true)
}
