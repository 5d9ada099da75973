//! How a device's time is shared among the trials that it holds.

use std::time::Duration;

/// Shares a device's time among the trials that it holds: each reads the difference of two readings.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Meter {
    held: u32,
    /// Seconds of device time that a trial held from the beginning would have been charged.
    reading: f64,
    at: Duration,
}

impl Meter {
    /// The reading at `now`.
    pub(super) fn read(&mut self, now: Duration) -> f64 {
        if self.held > 0 {
            self.reading += now.saturating_sub(self.at).as_secs_f64() / f64::from(self.held);
        }
        self.at = now;
        self.reading
    }

    /// A trial comes; answers with the reading at which it does.
    pub(super) fn take(&mut self, now: Duration) -> f64 {
        let reading = self.read(now);
        self.held += 1;
        reading
    }

    /// A trial goes; answers with the reading at which it does.
    pub(super) fn give(&mut self, now: Duration) -> f64 {
        let reading = self.read(now);
        self.held = self.held.saturating_sub(1);
        reading
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pack_shares_the_time_and_an_idle_device_costs_nothing() {
        let at = Duration::from_secs;
        let mut meter = Meter::default();
        let first = meter.take(at(100));
        let second = meter.take(at(110)); // 10 s alone
        let second_used = meter.give(at(130)) - second; // 20 s together
        let first_used = meter.give(at(135)) - first; // 5 s alone
        assert_eq!((first_used, second_used), (10.0 + 10.0 + 5.0, 10.0));
        let third = meter.take(at(1000));
        assert_eq!(meter.give(at(1001)) - third, 1.0);
    }
}
