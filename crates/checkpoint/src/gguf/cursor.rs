//! Reading little-endian values off untrusted bytes without ever leaving them.

/// What is wrong with the bytes, in words; the caller adds where.
pub(super) type Problem = String;

/// A position in the bytes of a file.
#[derive(Debug, Clone)]
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Bytes read so far.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    pub(super) fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// The next `n` bytes.
    pub(super) fn take(&mut self, n: u64) -> Result<&'a [u8], Problem> {
        let left = self.remaining();
        let n = usize::try_from(n).ok().filter(|n| *n <= left);
        let Some(n) = n else {
            return Err(format!(
                "the data ends too early, at byte {}",
                self.bytes.len()
            ));
        };
        let taken = &self.bytes[self.at..self.at + n];
        self.at += n;
        Ok(taken)
    }

    pub(super) fn word<const N: usize>(&mut self) -> Result<[u8; N], Problem> {
        let mut word = [0; N];
        word.copy_from_slice(self.take(N as u64)?);
        Ok(word)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Problem> {
        self.word().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Problem> {
        self.word().map(u64::from_le_bytes)
    }

    /// A count of items of at least `item_bytes` each, refused when the rest of the data cannot hold them.
    pub(super) fn count(&mut self, item_bytes: usize, items: &str) -> Result<u64, Problem> {
        let count = self.u64()?;
        let most = (self.remaining() / item_bytes) as u64;
        if count > most {
            return Err(format!(
                "it claims {count} {items}, but the {} bytes that follow hold at most {most}",
                self.remaining()
            ));
        }
        Ok(count)
    }

    /// The bytes of a string of at most `most` bytes.
    pub(super) fn string(&mut self, most: usize) -> Result<&'a [u8], Problem> {
        let len = self.count(1, "bytes of text")?;
        if len > most as u64 {
            return Err(format!(
                "it claims {len} bytes of text; at most {most} are accepted"
            ));
        }
        self.take(len)
    }
}

/// `bytes` as text; the position of the first byte that is not UTF-8 is an error.
pub(super) fn utf8(bytes: &[u8]) -> Result<&str, Problem> {
    std::str::from_utf8(bytes)
        .map_err(|error| format!("is not UTF-8 from its byte {} on", error.valid_up_to()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_read_past_the_end() {
        let mut cursor = Cursor::new(&[1, 0, 0, 0, 9]);
        assert_eq!(cursor.u32().unwrap(), 1);
        assert!(cursor.u32().unwrap_err().contains("at byte 5"));
        assert_eq!((cursor.at(), cursor.remaining()), (4, 1));
        assert!(cursor.take(u64::MAX).is_err());
        assert_eq!(cursor.take(1).unwrap(), [9]);
    }

    #[test]
    fn counts_and_lengths_are_bounded_by_what_follows() {
        let bytes = [&2u64.to_le_bytes()[..], &[0; 9]].concat();
        assert!(
            Cursor::new(&bytes)
                .count(5, "items")
                .unwrap_err()
                .contains("2 items")
        );
        assert_eq!(Cursor::new(&bytes).count(4, "items").unwrap(), 2);
        assert_eq!(Cursor::new(&bytes).string(2).unwrap(), [0, 0]);
        assert!(
            Cursor::new(&bytes)
                .string(1)
                .unwrap_err()
                .contains("at most 1")
        );
    }
}
