//! What a trial lacked that its device cannot hold. It travels and is kept as the beginning of the failure's message, so
//! that people and programs read one and the same thing, in records of earlier versions too.

use super::{Failure, FailureClass};
use std::fmt;

/// Bytes that a trial needs and what there was for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shortage {
    /// Of the base.
    pub base: u64,
    /// Of the trial alone.
    pub own: u64,
    /// The device's, for trials.
    pub device: u64,
}

impl Shortage {
    /// What the trial and its base need together.
    pub fn needed(&self) -> u64 {
        self.base.saturating_add(self.own)
    }

    /// What a failure says that the trial lacked, to the megabyte; `None` if it says nothing of it.
    pub fn of(failure: &Failure) -> Option<Self> {
        if failure.class != FailureClass::OutOfMemory {
            return None;
        }
        let (_, rest) = failure.message.split_once("needs ")?;
        let (_, rest) = rest.split_once(" GB (")?;
        let (base, rest) = rest.split_once(" GB base, ")?;
        let (own, rest) = rest.split_once(" GB its own), device has ")?;
        let device = rest.split(';').next()?;
        let bytes = |gigabytes: &str| -> Option<u64> {
            let value: f64 = gigabytes.parse().ok()?;
            (value.is_finite() && value >= 0.0).then_some((value * 1e9).round() as u64)
        };
        Some(Self { base: bytes(base)?, own: bytes(own)?, device: bytes(device)? })
    }
}

/// `does not fit: needs 17.200 GB (13.500 GB base, 3.700 GB its own), device has 15.800`.
impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gb = |bytes: u64| bytes as f64 / 1e9;
        write!(
            f,
            "does not fit: needs {:.3} GB ({:.3} GB base, {:.3} GB its own), device has {:.3}",
            gb(self.needed()),
            gb(self.base),
            gb(self.own),
            gb(self.device)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn failure(class: FailureClass, message: &str) -> Failure {
        Failure { class, message: message.into() }
    }

    proptest! {
        #[test]
        fn what_is_said_is_read(base in 0u64..1 << 48, own in 0u64..1 << 48, device in 0u64..1 << 48) {
            let said = Shortage { base, own, device };
            let message = format!("one: {said}; lower batch_size");
            let read = Shortage::of(&failure(FailureClass::OutOfMemory, &message)).unwrap();
            for (read, said) in [(read.base, base), (read.own, own), (read.device, device)] {
                prop_assert!(read.abs_diff(said) <= 500_001, "{read} is not {said}");
            }
        }
    }

    #[test]
    fn other_messages_say_nothing_of_it() {
        let said = Shortage { base: 1, own: 2, device: 3 }.to_string();
        for (class, message) in [
            (FailureClass::User, said.as_str()),
            (FailureClass::OutOfMemory, "the device ran out of memory"),
            (FailureClass::OutOfMemory, "needs 1 GB (x GB base, 2 GB its own), device has 3"),
            (FailureClass::OutOfMemory, "needs 1 GB (NaN GB base, 2 GB its own), device has 3"),
        ] {
            assert_eq!(Shortage::of(&failure(class, message)), None, "{message}");
        }
    }
}
