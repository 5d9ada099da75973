//! Tensors read ahead: while one is worked on, a thread reads the next from its file.

use super::Checkpoint;
use crate::error::{Result, TrainError};
use candle_core::{Device, Tensor};
use std::sync::mpsc::sync_channel;

impl Checkpoint {
    /// Has `work` go through tensors in the order of `names`: what it is given answers with the next, in the computer's
    /// memory, in the type that it has on disk. While it works on one, the next is read, and none after that: beside what
    /// `work` keeps there are two tensors at most.
    ///
    /// # Errors
    /// Those of `work`; the system gives no thread. A tensor that cannot be read ([`Checkpoint::read`]) is an error in its
    /// turn.
    pub(crate) fn read_ahead<T>(
        &self,
        names: &[String],
        work: impl FnOnce(&mut dyn FnMut(&str) -> Result<Tensor>) -> Result<T>,
    ) -> Result<T> {
        std::thread::scope(|scope| {
            // Without room, so that what was read waits until it is taken.
            let (sender, receiver) = sync_channel(0);
            let read = move || {
                for name in names {
                    let tensor = self.read(name, &Device::Cpu);
                    let failed = tensor.is_err();
                    // Nobody takes it any more once the work has failed.
                    if sender.send((name, tensor)).is_err() || failed {
                        return;
                    }
                }
            };
            let thread = std::thread::Builder::new().name("weights".into());
            thread.spawn_scoped(scope, read).map_err(TrainError::io(&self.dir))?;
            work(&mut |name| match receiver.recv() {
                Ok((ahead, tensor)) if ahead == name => tensor,
                // Not one of `names` in their order.
                _ => self.read(name, &Device::Cpu),
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use std::path::Path;

    /// A directory whose tensors `a`, `b`, … are vectors of 1000 times their number.
    fn checkpoint(dir: &Path, count: u8) -> (Checkpoint, Vec<String>) {
        let names: Vec<String> = (0..count).map(|i| char::from(b'a' + i).to_string()).collect();
        let tensor = |i: u8| Tensor::full(f32::from(i), 1000, &Device::Cpu).unwrap();
        let tensors: HashMap<_, _> = names.iter().cloned().zip((0..count).map(tensor)).collect();
        candle_core::safetensors::save(&tensors, dir.join("model.safetensors")).unwrap();
        (Checkpoint::open(dir).unwrap(), names)
    }

    fn first(tensor: &Tensor) -> f32 {
        tensor.to_vec1::<f32>().unwrap()[0]
    }

    #[test]
    fn tensors_come_in_their_order() {
        let dir = tempfile::tempdir().unwrap();
        let (checkpoint, mut names) = checkpoint(dir.path(), 6);
        names.reverse();
        let read = checkpoint.read_ahead(&names, |next| {
            names.iter().map(|name| Ok(first(&next(name)?))).collect::<Result<Vec<_>>>()
        });
        assert_eq!(read.unwrap(), [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]);
        // One that was not asked for in its turn is read all the same.
        let out_of_turn = checkpoint.read_ahead(&names, |next| Ok(first(&next("c")?)));
        assert_eq!(out_of_turn.unwrap(), 2.0);
    }

    #[test]
    fn work_that_ends_early_leaves_no_thread() {
        let dir = tempfile::tempdir().unwrap();
        let (checkpoint, names) = checkpoint(dir.path(), 6);
        for taken in 0..3 {
            let ended = checkpoint.read_ahead(&names, |next| {
                names.iter().take(taken).try_for_each(|name| next(name).map(drop))?;
                Err::<(), _>(TrainError::model(dir.path(), "is not liked", "take another"))
            });
            assert!(ended.unwrap_err().to_string().contains("is not liked"));
        }
    }

    /// A file that is cut off while the first tensor is worked on: the second may have been read by then, the third not.
    #[test]
    fn no_more_than_one_is_read_ahead() {
        let dir = tempfile::tempdir().unwrap();
        let (checkpoint, names) = checkpoint(dir.path(), 4);
        let third = checkpoint.read_ahead(&names, |next| {
            assert_eq!(first(&next("a")?), 0.0);
            std::fs::File::create(dir.path().join("model.safetensors")).unwrap();
            let _ = next("b");
            next("c").map(drop)
        });
        let message = third.unwrap_err().to_string();
        assert!(message.contains("was cut off while it was used"), "{message}");
    }
}
