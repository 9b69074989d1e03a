//! Comparison of float slices with a message that names the worst value.

/// Asserts that every `got[i]` lies within `tolerance` of `want[i]`, relative to the largest
/// magnitude in `want` (or to 1 when all of `want` is smaller).
///
/// # Panics
/// Lengths differ, something is not finite, or a value lies outside.
#[track_caller]
pub fn assert_close(what: &str, got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len(), "{what}: number of values");
    let scale = want
        .iter()
        .fold(1.0f32, |scale, value| scale.max(value.abs()));
    for (at, (got, want)) in got.iter().zip(want).enumerate() {
        // Written so that NaN fails.
        let close = (got - want).abs() <= tolerance * scale;
        assert!(
            close,
            "{what}[{at}]: got {got}, want {want} within {tolerance} x {scale}"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tolerance_is_relative_to_the_largest() {
        assert_close("x", &[100.0, 0.05], &[100.0, 0.0], 1e-3);
        assert_close("x", &[0.0005], &[0.0], 1e-3);
    }

    #[test]
    #[should_panic(expected = "x[1]")]
    fn nan_is_not_close() {
        assert_close("x", &[1.0, f32::NAN], &[1.0, f32::NAN], 1.0);
    }
}
