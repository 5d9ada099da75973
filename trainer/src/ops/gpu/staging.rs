//! The way of weights onto a device: their bytes go in pieces, each through a slot, which has room for a piece in the
//! computer's memory and on the device. While a thread of its own reads one piece from its file into a slot, the one before
//! is copied on a stream of copies, and what is held is made of the one before that by kernels on the device's own stream.
//!
//! A slot is in one place at a time, and goes round:
//!
//! 1. The thread that reads waits until the device is past what reads the slot's last piece ([`Slot::wait`]), and fills it.
//! 2. The thread that works has its bytes copied, which the device's own stream waits for ([`Slot::send`]), launches kernels
//!    that read them there, and notes that place in the stream ([`Slot::mark`]).
//!
//! So neither of a slot's memories is written while the device may read it, and no event is kept but those that are in the
//! slot itself. Between 2 and 1 it is [`Busy`]: its memories are given back, whatever fails, only once the device has done all
//! that it was given, and never if that cannot be waited for.

use super::problem;
#[cfg(feature = "cuda")]
use super::slots;
use crate::error::{Result, TrainError};
use candle_core::Device;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};

/// One is read into, one is copied, of one the numbers are made.
const SLOTS: usize = 3;

/// Room for a piece in the computer's memory and on a device, and what orders the two streams that use them. Each call is
/// made by the one thread that has the slot.
pub(super) trait Slot: Send {
    /// The computer's memory, which the device is not at: nothing was sent, or it was waited for since.
    fn bytes(&mut self) -> Result<&mut [u8]>;

    /// Begins to copy the first `count` bytes to the device. What is launched there from now on comes after the copy and
    /// finds them at the place that is returned.
    fn send(&mut self, count: usize) -> Result<u64>;

    /// Notes that what was launched so far is all that reads them.
    fn mark(&mut self) -> Result<()>;

    /// Waits until the device is past the last mark, if there is one.
    fn wait(&mut self) -> Result<()>;

    /// Waits until the device has done all that it was given.
    fn drain(&mut self) -> Result<()>;
}

/// Slots of a device, with room for that many bytes each.
pub(super) fn slots(device: &Device, bytes: usize) -> Result<Vec<Box<dyn Slot>>> {
    #[cfg(test)]
    if device.is_cpu() {
        return Ok(super::emulated::slots(SLOTS, bytes));
    }
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return slots::of(device, SLOTS, bytes);
    }
    Err(problem(format!("pieces of {bytes} bytes for {device:?}, which is no GPU")))
}

/// A slot that the device may be at.
struct Busy(Option<Box<dyn Slot>>);

impl Busy {
    /// The slot, once the device is past it.
    fn wait(mut self) -> Result<Box<dyn Slot>> {
        if let Some(slot) = &mut self.0 {
            slot.wait()?;
        }
        self.0.take().ok_or_else(|| problem("a slot was taken twice"))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let Some(mut slot) = self.0.take() else { return };
        if slot.drain().is_err() {
            // The device may still be at its memory. Such a device is lost for this process, and three pieces with it.
            std::mem::forget(slot);
        }
    }
}

/// A slot with a piece in it: how many of its bytes that is.
type Full = (Box<dyn Slot>, usize);

/// The end that fills slots.
pub(crate) struct Filling {
    free: Receiver<Busy>,
    full: Sender<Result<Full>>,
}

impl Filling {
    /// Has `read` fill the next slot; it says how many bytes it had. False if nobody takes them any more.
    ///
    /// # Errors
    /// Those of `read`, and of kernels that were launched before.
    pub(crate) fn piece(&self, read: impl FnOnce(&mut [u8]) -> Result<usize>) -> Result<bool> {
        let Ok(busy) = self.free.recv() else { return Ok(false) };
        let mut slot = busy.wait()?;
        let count = read(slot.bytes()?)?;
        Ok(self.full.send(Ok((slot, count))).is_ok())
    }
}

/// The end that empties them.
pub(crate) struct Emptying {
    full: Receiver<Result<Full>>,
    free: Sender<Busy>,
}

impl Emptying {
    /// Has `launch` launch what reads the next piece, given where it lies on the device and its bytes.
    ///
    /// # Errors
    /// Those of `launch`; the piece could not be read; the device fails.
    pub(crate) fn piece(&self, launch: impl FnOnce(u64, usize) -> Result<()>) -> Result<()> {
        let full = self.full.recv().map_err(|_| problem("a weight has fewer pieces than bytes"))?;
        let (slot, count) = full?;
        let mut busy = Busy(Some(slot));
        if let Some(slot) = &mut busy.0 {
            let at = slot.send(count)?;
            launch(at, count)?;
            slot.mark()?;
        }
        // Where nobody fills slots any more, this one goes.
        let _ = self.free.send(busy);
        Ok(())
    }
}

/// Has `read` fill slots on a thread of its own, and `work` empty them on this one, in the same order. An error of `read`
/// is that of the piece which `work` then asks for.
///
/// # Errors
/// Those of `work`; the system gives no thread, of which `dir` is told.
pub(super) fn through<T>(
    slots: Vec<Box<dyn Slot>>,
    dir: &Path,
    read: impl FnOnce(&Filling) -> Result<()> + Send,
    work: impl FnOnce(&Emptying) -> Result<T>,
) -> Result<T> {
    let ((free_again, free), (filled, full)) = (channel(), channel());
    for slot in slots {
        // The other end is here.
        let _ = free_again.send(Busy(Some(slot)));
    }
    std::thread::scope(|scope| {
        let reading = move || {
            let filling = Filling { free, full: filled };
            if let Err(error) = read(&filling) {
                // Nobody hears of it once the work is over.
                let _ = filling.full.send(Err(error));
            }
        };
        let thread = std::thread::Builder::new().name("weights".into());
        thread.spawn_scoped(scope, reading).map_err(TrainError::io(dir))?;
        // Dropped before the thread is waited for, which then finds nobody.
        work(&Emptying { full, free: free_again })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;
    use std::sync::{Arc, Mutex};

    /// What a device is given in its stream.
    #[derive(Clone, Copy, PartialEq)]
    enum Work {
        /// Something that is at a slot's memory: a copy, or a kernel.
        At(usize),
        /// A slot's mark.
        Mark(usize),
    }

    /// A device that does nothing before somebody waits for it.
    #[derive(Default)]
    struct Lazy {
        given: VecDeque<Work>,
        /// The numbers that its kernels read.
        read: Vec<u8>,
        /// Slots whose memory was given back.
        freed: usize,
        /// What a device cannot bear.
        wrong: Vec<String>,
    }

    impl Lazy {
        fn is_at(&self, slot: usize) -> bool {
            self.given.contains(&Work::At(slot))
        }
    }

    /// A step of a load that fails, and the piece in which it does, counted for each step.
    type Fails = Option<(&'static str, usize)>;

    struct LazySlot {
        number: usize,
        bytes: Vec<u8>,
        device: Arc<Mutex<Lazy>>,
        fails: Arc<Mutex<Fails>>,
    }

    /// Fails if it is this step's turn to.
    fn step(name: &'static str, fails: &Mutex<Fails>) -> Result<()> {
        match &mut *fails.lock().unwrap() {
            Some((step, 0)) if *step == name => Err(problem(format!("{name} fails"))),
            Some((step, after)) if *step == name => {
                *after -= 1;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    impl Slot for LazySlot {
        fn bytes(&mut self) -> Result<&mut [u8]> {
            let mut device = self.device.lock().unwrap();
            if device.is_at(self.number) {
                device.wrong.push(format!("slot {} is filled while the device is at it", self.number));
            }
            drop(device);
            Ok(&mut self.bytes)
        }

        fn send(&mut self, count: usize) -> Result<u64> {
            let mut device = self.device.lock().unwrap();
            device.given.push_back(Work::At(self.number));
            step("send", &self.fails)?;
            device.read.extend_from_slice(&self.bytes[..count]);
            Ok(self.number as u64)
        }

        fn mark(&mut self) -> Result<()> {
            step("mark", &self.fails)?;
            self.device.lock().unwrap().given.push_back(Work::Mark(self.number));
            Ok(())
        }

        fn wait(&mut self) -> Result<()> {
            step("wait", &self.fails)?;
            let mut device = self.device.lock().unwrap();
            // Up to its mark, which is the last there is of it.
            if let Some(at) = device.given.iter().position(|work| *work == Work::Mark(self.number)) {
                device.given.drain(..=at);
            }
            Ok(())
        }

        fn drain(&mut self) -> Result<()> {
            step("drain", &self.fails)?;
            self.device.lock().unwrap().given.clear();
            Ok(())
        }
    }

    impl Drop for LazySlot {
        fn drop(&mut self) {
            let mut device = self.device.lock().unwrap();
            if device.is_at(self.number) {
                device.wrong.push(format!("slot {} is given back while the device is at it", self.number));
            }
            device.freed += 1;
        }
    }

    /// Sends so many pieces of three bytes through some slots, of which `work` takes so many; what the device found, and
    /// the error.
    fn load((slots, pieces, taken): (usize, usize, usize), fails: Fails) -> (Lazy, String) {
        let (device, fails) = (Arc::new(Mutex::new(Lazy::default())), Arc::new(Mutex::new(fails)));
        let slot = |number| -> Box<dyn Slot> {
            let (device, fails) = (device.clone(), fails.clone());
            Box::new(LazySlot { number, bytes: vec![u8::MAX; 4], device, fails })
        };
        let slots = (0..slots).map(slot).collect();
        let read = |filling: &Filling| {
            for piece in 0..pieces {
                let read = |bytes: &mut [u8]| {
                    bytes[..3].fill(piece as u8);
                    step("read", &fails).map(|()| 3)
                };
                if !filling.piece(read)? {
                    return Ok(());
                }
            }
            Ok(())
        };
        let ended = through(slots, Path::new("."), read, |emptying| {
            for _ in 0..taken {
                emptying.piece(|at, _| {
                    device.lock().unwrap().given.push_back(Work::At(at as usize));
                    step("launch", &fails)
                })?;
            }
            Ok(())
        });
        let found = std::mem::take(&mut *device.lock().unwrap());
        (found, ended.err().map(|error| error.to_string()).unwrap_or_default())
    }

    /// The pieces arrive in their order, and no slot is filled or given back while the device is at it, in whichever step
    /// of whichever piece a load ends.
    #[test]
    fn slots_are_left_alone_while_the_device_is_at_them() {
        for slots in 1..=3 {
            for pieces in [0, 1, 2, 3, 7] {
                for taken in 0..=pieces {
                    let (found, error) = load((slots, pieces, taken), None);
                    let want: Vec<u8> = (0..taken).flat_map(|piece| [piece as u8; 3]).collect();
                    assert_eq!(
                        (found.read, error.as_str(), found.freed),
                        (want, "", slots),
                        "{taken} of {pieces}"
                    );
                    assert!(found.wrong.is_empty(), "{:?}", found.wrong);
                }
                for name in ["read", "send", "launch", "mark", "wait"] {
                    for piece in 0..pieces {
                        let (found, error) = load((slots, pieces, pieces), Some((name, piece)));
                        let what = format!("{name} of piece {piece} of {pieces} in {slots}");
                        assert!(error.contains(&format!("{name} fails")), "{what}: {error:?}");
                        assert!(found.wrong.is_empty(), "{what}: {:?}", found.wrong);
                        assert_eq!(found.freed, slots, "{what}");
                        let whole = found.read.len() / 3;
                        assert!(
                            whole == if ["launch", "mark"].contains(&name) { piece + 1 } else { piece },
                            "{what}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn work_that_asks_for_more_than_there_is_fails() {
        let (found, error) = load((3, 2, 3), None);
        assert!(error.contains("fewer pieces than bytes") && found.wrong.is_empty(), "{error}");
    }

    /// A slot that cannot be waited for keeps its memory.
    #[test]
    fn what_the_device_may_be_at_is_not_given_back() {
        let (found, _) = load((3, 5, 5), Some(("drain", 0)));
        assert!(found.freed < 3 && found.wrong.is_empty(), "{}, {:?}", found.freed, found.wrong);
    }
}
