//! Memory that disks can read into: its address is a multiple of [`ALIGN`], and it is cut and joined without copying.

use bytes::{Buf, BytesMut};

use super::ALIGN;

/// `n_bytes` zeroed bytes whose address is a multiple of [`ALIGN`].
///
/// Cut it with [`BytesMut::split_to`] at multiples of [`ALIGN`]: all pieces stay aligned, and `unsplit` of neighbours
/// (the earlier one first) joins them in place. The system gives pages when they are first written.
pub fn aligned(n_bytes: usize) -> BytesMut {
    let mut memory = BytesMut::zeroed(n_bytes + ALIGN - 1);
    let before = memory.as_ptr().addr().next_multiple_of(ALIGN) - memory.as_ptr().addr();
    memory.advance(before);
    memory.truncate(n_bytes);
    memory
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_multiples_and_lengths_are_exact() {
        for n_bytes in [0, 1, 511, ALIGN - 1, ALIGN, ALIGN + 1, 5 * ALIGN, 3 << 20] {
            let memory = aligned(n_bytes);
            assert_eq!(memory.len(), n_bytes);
            assert!(n_bytes == 0 || memory.as_ptr().addr().is_multiple_of(ALIGN));
            assert!(memory.iter().all(|&byte| byte == 0));
        }
    }

    #[test]
    fn pieces_are_joined_in_place_whatever_became_of_them_meanwhile() {
        let mut whole = aligned(6 * ALIGN);
        let address = whole.as_ptr();
        let mut first = whole.split_to(ALIGN);
        let mut second = whole.split_to(3 * ALIGN);
        assert!(second.as_ptr().addr().is_multiple_of(ALIGN));
        // On threads of their own, as readers use them.
        let write = |mut piece: BytesMut, with| {
            std::thread::spawn(move || {
                piece.fill(with);
                piece
            })
        };
        let (a, b) = (write(first, 1), write(second, 2));
        (first, second) = (a.join().unwrap(), b.join().unwrap());
        first.unsplit(second);
        first.unsplit(whole);
        assert_eq!(first.as_ptr(), address, "nothing was copied");
        assert_eq!(first.len(), 6 * ALIGN);
        let of = |at: usize| (first[at * ALIGN], first[(at + 1) * ALIGN - 1]);
        assert_eq!(
            (of(0), of(1), of(3), of(5)),
            ((1, 1), (2, 2), (2, 2), (0, 0))
        );
        // Again, down to nothing.
        for _ in 0..3 {
            let mut pieces: Vec<_> = (0..6).map(|_| first.split_to(ALIGN)).collect();
            assert!(first.is_empty());
            let mut joined = pieces.remove(0);
            pieces.into_iter().for_each(|piece| joined.unsplit(piece));
            joined.unsplit(std::mem::take(&mut first));
            first = joined;
            assert_eq!((first.as_ptr(), first.len()), (address, 6 * ALIGN));
        }
    }
}
