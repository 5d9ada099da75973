//! Values as lines of JSON, between an agent and the processes that host its engines.

use bytes::BytesMut;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt};

/// The longest line. A trial's configuration and a checkpoint's event are thousands of bytes.
const MAX_LINE: usize = 16_000_000;

/// A value as a line, its end included.
pub(super) fn encode(value: &impl Serialize) -> serde_json::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    Ok(line)
}

/// The value of a line.
pub(super) fn decode<T: DeserializeOwned>(line: &[u8]) -> serde_json::Result<T> {
    serde_json::from_slice(line).map_err(|error| {
        let start = String::from_utf8_lossy(line.get(..80).unwrap_or(line)).into_owned();
        serde::de::Error::custom(format!("{start:?} ({error})"))
    })
}

/// The lines of a pipe.
pub(super) struct Lines<R> {
    source: R,
    read: BytesMut,
    /// How many bytes of `read` are known to hold no line's end.
    searched: usize,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    pub(super) fn new(source: R) -> Self {
        Self { source, read: BytesMut::new(), searched: 0 }
    }

    /// The next line without its end; `None` at the end of the pipe, where half a line counts for nothing: whoever wrote
    /// it did not get to its end. Nothing is lost when it is dropped half-way.
    pub(super) async fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            let found = self.read.iter().skip(self.searched).position(|byte| *byte == b'\n');
            if let Some(i) = found {
                let mut line = self.read.split_to(self.searched + i + 1);
                line.truncate(line.len() - 1);
                self.searched = 0;
                return Ok(Some(line.to_vec()));
            }
            self.searched = self.read.len();
            if self.searched > MAX_LINE {
                return Err(io::Error::other(format!("a line of more than {MAX_LINE} bytes")));
            }
            if self.source.read_buf(&mut self.read).await? == 0 {
                return Ok(None);
            }
        }
    }
}

/// Points with numbers that JSON has not: a loss may be infinite.
pub(super) mod points {
    use domain::Timestamp;
    use domain::metric::MetricPoint;
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    #[serde(untagged)]
    enum Number {
        Finite(f64),
        Other(String),
    }

    #[derive(Serialize, Deserialize)]
    struct Point(u64, Timestamp, Vec<(String, Number)>);

    pub(crate) fn serialize<S: Serializer>(points: &[MetricPoint], to: S) -> Result<S::Ok, S::Error> {
        let number = |value: f64| {
            if value.is_finite() { Number::Finite(value) } else { Number::Other(value.to_string()) }
        };
        to.collect_seq(points.iter().map(|point| {
            let values = point.values.iter().map(|(name, value)| (name.clone(), number(*value))).collect();
            Point(point.step, point.time, values)
        }))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<MetricPoint>, D::Error> {
        let value = |(name, number)| match number {
            Number::Finite(value) => Ok((name, value)),
            Number::Other(text) => text.parse().map(|value| (name, value)).map_err(D::Error::custom),
        };
        let point = |Point(step, time, values): Point| {
            let values = values.into_iter().map(value).collect::<Result<_, _>>()?;
            Ok(MetricPoint { step, time, values })
        };
        Vec::<Point>::deserialize(from)?.into_iter().map(point).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_of_a_pipe() {
        for (bytes, want) in
            [("", vec![]), ("\"a\"\n\"b\"\n", vec!["\"a\"", "\"b\""]), ("\n\"a\"\n\"half", vec!["", "\"a\""])]
        {
            let mut lines = Lines::new(bytes.as_bytes());
            let mut found = Vec::new();
            while let Some(line) = lines.next().await.unwrap() {
                found.push(String::from_utf8(line).unwrap());
            }
            assert_eq!(found, want, "{bytes:?}");
        }
        let endless = vec![b'x'; MAX_LINE + 2];
        assert!(Lines::new(&endless[..]).next().await.is_err());
    }

    #[test]
    fn every_number_arrives_as_it_was() {
        use super::super::{Event, Happening};
        let numbers = [1.0, -0.0, 0.1 + 0.2, 5e-324, f64::MAX, f64::INFINITY, f64::NEG_INFINITY, f64::NAN];
        let values: Vec<_> = numbers.into_iter().map(|number| ("loss".to_string(), number)).collect();
        let time = domain::Clock::now(&domain::SystemClock::new());
        let point = domain::metric::MetricPoint { step: 3, time, values };
        let event = Event::Trial(crate::Assignment::new("t", 1), Happening::Points(vec![point]));
        let line = encode(&event).unwrap();
        let Event::Trial(_, Happening::Points(points)) = decode(&line).unwrap() else { panic!("points") };
        let found: Vec<_> = points[0].values.iter().map(|(_, number)| number.to_bits()).collect();
        assert_eq!(found, numbers.map(f64::to_bits));
        assert_eq!((points[0].step, points[0].time), (3, time));
    }

    #[test]
    fn what_is_no_value_is_shown() {
        let error = decode::<super::super::Event>(b"Segmentation fault").unwrap_err();
        assert!(error.to_string().contains("Segmentation fault"), "{error}");
    }
}
