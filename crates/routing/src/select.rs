//! Picking the best of a list: the one place that fixes the order "score descending, then id ascending".

/// Fills `ids` and `keys` with the best entries of `candidates`, best first, and returns how many there were
/// (at most `ids.len()`). Candidates must come in ascending id order; equal keys keep the lower id.
///
/// Insertion into a sorted array of k: most candidates fail the first comparison, and k is small.
pub(crate) fn top_k(
    candidates: impl Iterator<Item = (u16, f32)>,
    ids: &mut [u16],
    keys: &mut [f32],
) -> usize {
    let capacity = ids.len();
    let mut len = 0;
    for (id, key) in candidates {
        if len == capacity {
            if capacity == 0 || key <= keys[capacity - 1] {
                continue;
            }
        } else {
            len += 1;
        }
        let mut at = len - 1;
        while at > 0 && keys[at - 1] < key {
            keys[at] = keys[at - 1];
            ids[at] = ids[at - 1];
            at -= 1;
        }
        keys[at] = key;
        ids[at] = id;
    }
    len
}

/// The entry of `row` that follows `(id, key)` in the order "key descending, id ascending"; the first one for `None`.
///
/// Used where the number of picks is not known in advance: each pick costs one pass and no memory.
pub(crate) fn next_best(row: &[f32], after: Option<(u16, f32)>) -> Option<(u16, f32)> {
    let mut best: Option<(u16, f32)> = None;
    for (id, key) in numbered(row) {
        let is_later = after
            .is_none_or(|(last_id, last_key)| key < last_key || (key == last_key && id > last_id));
        if is_later && best.is_none_or(|(_, best_key)| key > best_key) {
            best = Some((id, key));
        }
    }
    best
}

/// The entries of `row` with their ids.
pub(crate) fn numbered(row: &[f32]) -> impl Iterator<Item = (u16, f32)> + '_ {
    (0u16..).zip(row.iter().copied())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn equal_keys_go_to_the_lower_id() {
        let (mut ids, mut keys) = ([0; 3], [0.0; 3]);
        let found = top_k(numbered(&[1.0, 2.0, 1.0, 2.0, 1.0]), &mut ids, &mut keys);
        assert_eq!((found, ids, keys), (3, [1, 3, 0], [2.0, 2.0, 1.0]));
    }

    #[test]
    fn fewer_candidates_than_slots() {
        let (mut ids, mut keys) = ([9; 3], [0.0; 3]);
        assert_eq!(top_k(numbered(&[0.5]), &mut ids, &mut keys), 1);
        assert_eq!(ids[0], 0);
        assert_eq!(top_k(numbered(&[0.5]), &mut [], &mut []), 0);
    }

    proptest! {
        #[test]
        fn both_selections_agree_with_a_full_sort(row in prop::collection::vec(-3i8..3, 1..40), k in 1usize..40) {
            let row: Vec<f32> = row.into_iter().map(f32::from).collect();
            let mut sorted: Vec<(u16, f32)> = numbered(&row).collect();
            sorted.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            let k = k.min(row.len());
            let (mut ids, mut keys) = (vec![0; k], vec![0.0; k]);
            prop_assert_eq!(top_k(numbered(&row), &mut ids, &mut keys), k);
            let found: Vec<(u16, f32)> = ids.into_iter().zip(keys).collect();
            prop_assert_eq!(&found[..], &sorted[..k]);
            let mut last = None;
            for &expected in &sorted {
                last = next_best(&row, last);
                prop_assert_eq!(last, Some(expected));
            }
            prop_assert_eq!(next_best(&row, last), None);
        }
    }
}
