//! A base's weights on their way from its files to where they are held.

use super::LoadProgress;
use crate::checkpoint::Checkpoint;
use crate::error::Result;
#[cfg(any(feature = "cuda", test))]
use crate::ops::{self, incoming};
use crate::weight::{Numbers, Weight};
use candle_core::Device;

/// Answers with the next of the wanted tensors, and tells of its quantising.
pub(crate) type Next<'a> = dyn FnMut(&str, Numbers, &mut dyn FnMut(LoadProgress)) -> Result<Weight> + 'a;

/// Has `work` go through tensors that no one quantised, in the order of `wanted`. While it has one brought into its numbers,
/// the next is read: on the CPU whole, for a GPU in pieces, which are copied and quantised side by side.
///
/// # Errors
/// Those of `work`; the system gives no thread, a GPU no memory for the pieces. A tensor that cannot be read
/// ([`Checkpoint::read`]) is an error in its turn.
pub(super) fn each<T>(
    tensors: &Checkpoint,
    wanted: &[(String, Numbers)],
    device: &Device,
    work: impl FnOnce(&mut Next) -> Result<T>,
) -> Result<T> {
    #[cfg(any(feature = "cuda", test))]
    if ops::on_gpu(device) {
        return in_pieces(tensors, wanted, (device, incoming::PIECE), work);
    }
    let names: Vec<String> = wanted.iter().map(|(name, _)| name.clone()).collect();
    tensors.read_ahead(&names, |next| {
        work(&mut |name, held, watch| {
            let tensor = next(name)?.to_device(device)?;
            told(held, watch, || held.hold(&tensor))
        })
    })
}

/// Makes a weight, and tells of it if that is quantising.
fn told(
    held: Numbers,
    watch: &mut dyn FnMut(LoadProgress),
    make: impl FnOnce() -> Result<Weight>,
) -> Result<Weight> {
    let quantises = matches!(held, Numbers::Nf4 { .. });
    if quantises {
        watch(LoadProgress::Quantising);
    }
    let weight = make()?;
    if quantises {
        watch(LoadProgress::Quantised { bytes: weight.bytes() });
    }
    Ok(weight)
}

/// [`each`] for a GPU, with pieces of so many bytes.
#[cfg(any(feature = "cuda", test))]
pub(crate) fn in_pieces<T>(
    tensors: &Checkpoint,
    wanted: &[(String, Numbers)],
    (device, piece): (&Device, usize),
    work: impl FnOnce(&mut Next) -> Result<T>,
) -> Result<T> {
    let read = |filling: &incoming::Filling| {
        for (name, held) in wanted {
            let mut pieces = tensors.pieces(name, held.dtype())?;
            while pieces.left() > 0 {
                if !filling.piece(|bytes| pieces.read(bytes))? {
                    return Ok(());
                }
            }
        }
        Ok(())
    };
    incoming::pieces(device, piece, tensors.dir(), read, |emptying| {
        let mut order = wanted.iter();
        work(&mut |name, held, watch| {
            if order.next().is_none_or(|(next, numbers)| next != name || *numbers != held) {
                return Err(candle_core::Error::Msg(format!("{name} is not the next that is read")).into());
            }
            let dtype = tensors.dtype_in_pieces(name, held.dtype())?;
            let shape = tensors.shape(name)?;
            let mut weight = incoming::Incoming::new(shape, dtype, held, device)?;
            let bytes = shape.iter().product::<usize>() * dtype.size_in_bytes();
            for _ in 0..bytes.div_ceil(piece) {
                emptying.piece(|at, count| weight.piece(at, count))?;
            }
            told(held, watch, || weight.finish())
        })
    })
}
