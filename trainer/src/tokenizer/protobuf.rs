//! As much of Protocol Buffers' wire format as it takes to read a SentencePiece model.

/// A field's value as it stands on the wire.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Wire<'a> {
    /// An integer, boolean or enum.
    Varint(u64),
    /// A `float`.
    Float(f32),
    /// Eight bytes, which no field that we read has.
    Eight,
    /// A string, byte string or message.
    Bytes(&'a [u8]),
}

/// The fields of a message, each with its number. Ends after the first error.
#[derive(Debug, Clone)]
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Wire<'a>), String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.0 = &[];
        }
        Some(field)
    }
}

impl<'a> Fields<'a> {
    fn field(&mut self) -> Result<(u64, Wire<'a>), String> {
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Wire::Varint(self.varint()?),
            1 => self.take(8).map(|_| Wire::Eight)?,
            2 => {
                let length = self.varint()?;
                Wire::Bytes(self.take(length)?)
            }
            5 => {
                let bytes = self.take(4)?;
                Wire::Float(f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
            }
            kind => return Err(format!("a field has the unknown wire type {kind}")),
        };
        Ok((tag >> 3, value))
    }

    fn take(&mut self, length: u64) -> Result<&'a [u8], String> {
        let cut = || "the file ends inside a field".to_owned();
        let length = usize::try_from(length).map_err(|_| cut())?;
        let (taken, rest) = self.0.split_at_checked(length).ok_or_else(cut)?;
        self.0 = rest;
        Ok(taken)
    }

    /// Seven bits a byte, the lowest first; the top bit says that more follow.
    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err("an integer is longer than ten bytes".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_each_wire_type_and_refuses_what_is_cut() {
        let bytes = [0x08, 0x96, 0x01, 0x12, 2, b'h', b'i', 0x1d, 0, 0, 0x80, 0x3f];
        let fields: Vec<_> = Fields(&bytes).map(|f| f.unwrap()).collect();
        assert_eq!(fields, [(1, Wire::Varint(150)), (2, Wire::Bytes(b"hi")), (3, Wire::Float(1.0))]);
        for (bytes, problem) in [
            (&[0x08, 0x96][..], "ends inside"),
            (&[0x12, 3, b'h'], "ends inside"),
            (&[0x1d, 0], "ends inside"),
            (&[0x0b], "wire type 3"),
            (&[0xff; 12], "ten bytes"),
        ] {
            let results: Vec<_> = Fields(bytes).collect();
            assert!(results[0].as_ref().is_err_and(|e| e.contains(problem)), "{results:?}");
            assert_eq!(results.len(), 1);
        }
    }
}
