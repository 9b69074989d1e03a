//! A steering with a strength: from nothing to all of it, and beyond where that means something.

use super::{Numbers, SteerError, Steering};

impl Steering {
    /// This steering at `scale`: 0 is nothing, 1 all of it. Biases are multiplied by the scale, and so is what gains differ
    /// from 1 by and what is damped; muting becomes damping by the scale. What is masked or forced, and numbers of picks, have no
    /// degrees.
    ///
    /// # Errors
    /// [`SteerError::BadValue`] for a scale that is negative or not finite, between 0 and 1 or above 1 for what has no degrees, and above 1
    /// where more would be taken from an expert than it has.
    pub fn scaled(&self, scale: f32) -> Result<Self, SteerError> {
        let bad = |expected: &str| {
            Err(SteerError::BadValue {
                option: "scale",
                value: scale.to_string(),
                expected: expected.to_owned(),
            })
        };
        if !(scale >= 0.0 && scale.is_finite()) {
            return bad("0 or more");
        }
        if scale == 0.0 {
            return Ok(Self::default());
        }
        if scale == 1.0 {
            return Ok(self.clone());
        }
        let graded = Self {
            mute: self.mute.clone(),
            damp: self.damp.clone(),
            bias: self.bias.clone(),
            gain: self.gain.clone(),
            ..Self::default()
        };
        if graded != *self {
            return bad("0 or 1, since masks, forced experts and numbers of picks have no degrees");
        }
        let mut damp = self.damp.map(|part| part * scale);
        for (layers, experts) in self.mute.iter() {
            for expert in experts {
                damp.add(layers, *expert, scale);
            }
        }
        if all(&damp).any(|part| part > 1.0) {
            return bad(
                "a scale that takes no more from an expert than it has: at most 1 where one is muted",
            );
        }
        Ok(Self {
            damp,
            bias: self.bias.map(|bias| bias * scale),
            gain: self.gain.map(|gain| 1.0 + (gain - 1.0) * scale),
            ..Self::default()
        })
    }
}

fn all(numbers: &Numbers) -> impl Iterator<Item = f32> {
    numbers
        .iter()
        .flat_map(|(_, numbers)| numbers.iter().map(|(_, number)| *number))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scaled(json: &str, scale: f32) -> Result<String, String> {
        let steering: Steering = serde_json::from_str(json).unwrap();
        let scaled = steering.scaled(scale).map_err(|error| error.to_string())?;
        Ok(scaled.to_string())
    }

    #[test]
    fn numbers_go_with_the_scale_and_muting_becomes_damping() {
        let json = r#"{"mute":{"1":[3]},"bias":{"*":{"2":-4}},"gain":{"1":{"5":0.5}},"damp":{"2":{"1":0.5}}}"#;
        assert_eq!(
            scaled(json, 0.5).unwrap(),
            "damp-experts=2:1=0.25/1:3=0.5 bias-experts=*:2=-2 gain-experts=1:5=0.75"
        );
        assert_eq!(scaled(json, 0.0).unwrap(), "no");
        assert_eq!(
            scaled(json, 1.0).unwrap(),
            "mute-experts=1:3 damp-experts=2:1=0.5 bias-experts=*:2=-4 gain-experts=1:5=0.5"
        );
        assert_eq!(
            scaled(r#"{"bias":{"0":{"1":2}}}"#, 3.0).unwrap(),
            "bias-experts=0:1=6"
        );
    }

    #[test]
    fn what_has_no_degrees_is_all_or_nothing() {
        for (json, scale, said) in [
            (
                r#"{"mask":{"1":[3]}}"#,
                0.5,
                "scale = 0.5: expected 0 or 1, since masks",
            ),
            (r#"{"force":{"1":[3]}}"#, 2.0, "no degrees"),
            (
                r#"{"top_k":2,"bias":{"0":{"1":2}}}"#,
                0.5,
                "numbers of picks",
            ),
            (r#"{"mute":{"1":[3]}}"#, 1.5, "at most 1 where one is muted"),
            (
                r#"{"mute":{"1":[3]}}"#,
                -1.0,
                "scale = -1: expected 0 or more",
            ),
            (r#"{"mute":{"1":[3]}}"#, f32::NAN, "expected 0 or more"),
        ] {
            let error = scaled(json, scale).unwrap_err();
            assert!(error.contains(said), "{json}: {error}");
        }
        assert_eq!(
            scaled(r#"{"mask":{"1":[3]}}"#, 1.0).unwrap(),
            "mask-experts=1:3"
        );
        assert_eq!(scaled(r#"{"mask":{"1":[3]}}"#, 0.0).unwrap(), "no");
    }
}
