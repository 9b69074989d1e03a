//! The unit of a trace: one token at one layer ([`Row`]), and one layer's pass over several tokens ([`Step`]).

use crate::error::TraceError;
use crate::meta::TraceMeta;
use cadre_routing::Routing;

/// One row of a trace: the experts one token was sent to at one layer. `k` is the number of picks of this row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Row<'a> {
    /// Number of the sequence (document) in the trace, from 0.
    pub seq: u32,
    /// Position of the token in its sequence, from 0.
    pub pos: u32,
    /// Token id at that position.
    pub token: u32,
    /// Domain of the sequence, for example `code`.
    pub domain: &'a str,
    /// Decoder layer.
    pub layer: u16,
    /// Picked experts `[k]`, in the order of the policy (highest weight first).
    pub experts: &'a [u16],
    /// Their weights `[k]`.
    pub weights: &'a [f32],
    /// Router logits, one per expert of the layer, if they were recorded.
    pub logits: Option<&'a [f32]>,
    /// Output norm of each picked expert `[k]`, if they were recorded.
    pub norms: Option<&'a [f32]>,
}

impl Row<'_> {
    /// Checks the row against the model: ids in range, lengths equal, numbers finite.
    ///
    /// # Errors
    /// [`TraceError::Row`] naming the sequence, position and layer.
    pub fn check(&self, meta: &TraceMeta) -> Result<(), TraceError> {
        match self.problem(meta) {
            None => Ok(()),
            Some(problem) => Err(TraceError::Row {
                origin: String::new(),
                seq: self.seq,
                pos: self.pos,
                layer: usize::from(self.layer),
                problem,
            }),
        }
    }

    fn problem(&self, meta: &TraceMeta) -> Option<String> {
        let n_picks = self.experts.len();
        if usize::from(self.layer) >= meta.n_layers {
            return Some(format!(
                "the model has {} layers, so the layer must be below that",
                meta.n_layers
            ));
        }
        let n_experts = meta.n_experts_in(usize::from(self.layer));
        if let Some(expert) = self
            .experts
            .iter()
            .find(|&&expert| usize::from(expert) >= n_experts)
        {
            let whose = match meta.layer_experts.is_empty() {
                true => "model",
                false => "layer",
            };
            return Some(format!(
                "expert {expert} is out of range, the {whose} has {n_experts} experts"
            ));
        }
        let lengths = [
            ("weights", Some(self.weights), n_picks),
            ("logits", self.logits, n_experts),
            ("norms", self.norms, n_picks),
        ];
        for (what, values, expected) in lengths {
            let Some(values) = values else { continue };
            if values.len() != expected {
                return Some(format!(
                    "{what} has {} entries, expected {expected}",
                    values.len()
                ));
            }
            if let Some(value) = values.iter().find(|value| !value.is_finite()) {
                return Some(format!("{what} contains {value}, expected finite numbers"));
            }
        }
        None
    }
}

/// What an observer of the engine sees: one layer routed `T` consecutive tokens of one sequence.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// Number of the sequence in the trace, from 0.
    pub seq: u32,
    /// Position of the first token of the step.
    pub first_pos: u32,
    /// Token ids `[T]`.
    pub tokens: &'a [u32],
    /// Domain of the sequence.
    pub domain: &'a str,
    /// Decoder layer.
    pub layer: usize,
    /// Picks of the `T` tokens.
    pub routing: &'a Routing,
    /// Router logits `[T, n]` with the layer's experts, row-major.
    pub logits: Option<&'a [f32]>,
    /// Output norm of each pick, in the order of `routing` `[n_picks]`.
    pub norms: Option<&'a [f32]>,
}

impl<'a> Step<'a> {
    /// The rows of the step, in position order, checked.
    ///
    /// # Errors
    /// [`TraceError::Shape`] when slices do not fit together, [`TraceError::Row`] for a bad row.
    pub fn rows(&self, meta: &TraceMeta) -> Result<Vec<Row<'a>>, TraceError> {
        let n_tokens = self.tokens.len();
        let routing: &'a Routing = self.routing;
        let expect = |what, found, expected| {
            if found == expected {
                Ok(())
            } else {
                Err(TraceError::Shape {
                    layer: self.layer,
                    what,
                    found,
                    expected,
                })
            }
        };
        expect("routing", routing.n_tokens(), n_tokens)?;
        let n_experts = meta.n_experts_in(self.layer);
        expect(
            "logits",
            self.logits.map_or(n_tokens * n_experts, <[f32]>::len),
            n_tokens * n_experts,
        )?;
        let n_picks = (0..n_tokens).map(|t| routing.token(t).0.len()).sum();
        expect("norms", self.norms.map_or(n_picks, <[f32]>::len), n_picks)?;
        if self.layer >= meta.n_layers {
            return Err(TraceError::Shape {
                layer: self.layer,
                what: "the model's list of layers",
                found: meta.n_layers,
                expected: self.layer + 1,
            });
        }

        let mut rows = Vec::with_capacity(n_tokens);
        let mut first_pick = 0;
        for (t, &token) in self.tokens.iter().enumerate() {
            let (experts, weights) = routing.token(t);
            let row = Row {
                seq: self.seq,
                pos: self.first_pos + t as u32,
                token,
                domain: self.domain,
                layer: self.layer as u16,
                experts,
                weights,
                logits: self
                    .logits
                    .map(|logits| &logits[t * n_experts..(t + 1) * n_experts]),
                norms: self
                    .norms
                    .map(|norms| &norms[first_pick..first_pick + experts.len()]),
            };
            row.check(meta)?;
            first_pick += experts.len();
            rows.push(row);
        }
        Ok(rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta() -> TraceMeta {
        TraceMeta {
            digest: "d".into(),
            architecture: "a".into(),
            n_layers: 2,
            n_experts: 3,
            top_k: 1,
            layer_experts: Vec::new(),
            n_null: 0,
            attention: None,
            lossy: None,
        }
    }

    fn routing(tokens: &[(&[u16], &[f32])]) -> Routing {
        let mut routing = Routing::default();
        for (experts, weights) in tokens {
            routing.push_token(experts, weights);
        }
        routing
    }

    fn step<'a>(routing: &'a Routing, tokens: &'a [u32]) -> Step<'a> {
        Step {
            seq: 1,
            first_pos: 5,
            tokens,
            domain: "code",
            layer: 1,
            routing,
            logits: None,
            norms: None,
        }
    }

    #[test]
    fn a_step_becomes_one_row_per_token() {
        let routing = routing(&[(&[2], &[1.0]), (&[0, 1], &[0.7, 0.3])]);
        let logits = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0];
        let norms = [9.0, 8.0, 7.0];
        let step = Step {
            logits: Some(&logits),
            norms: Some(&norms),
            ..step(&routing, &[10, 11])
        };
        let rows = step.rows(&meta()).unwrap();
        assert_eq!(rows[1].pos, 6);
        assert_eq!(rows[1].token, 11);
        assert_eq!(rows[1].experts, [0, 1]);
        assert_eq!(rows[1].logits, Some(&logits[3..]));
        assert_eq!(rows[0].norms, Some(&norms[..1]));
        assert_eq!(rows[1].norms, Some(&norms[1..]));
    }

    #[test]
    fn ids_and_logits_are_those_of_the_layer() {
        let uneven = TraceMeta {
            layer_experts: vec![3, 2],
            ..meta()
        };
        let (known, unknown) = (routing(&[(&[1], &[1.0])]), routing(&[(&[2], &[1.0])]));
        let (two, three) = ([0.5; 2], [0.5; 3]);
        let rows = |routing, logits| {
            Step {
                logits,
                ..step(routing, &[10])
            }
            .rows(&uneven)
            .map(|rows| rows.len())
        };
        assert_eq!(rows(&known, Some(&two[..])).unwrap(), 1);
        assert!(rows(&known, Some(&three[..])).is_err());
        let error = rows(&unknown, None).unwrap_err().to_string();
        assert!(error.contains("the layer has 2 experts"), "{error}");
    }

    #[test]
    fn slices_that_do_not_fit_are_refused() {
        let routing = routing(&[(&[2], &[1.0])]);
        let short = [0.0; 2];
        let cases = [
            (step(&routing, &[10, 11]), "routing"),
            (
                Step {
                    logits: Some(&short),
                    ..step(&routing, &[10])
                },
                "logits",
            ),
            (
                Step {
                    norms: Some(&short),
                    ..step(&routing, &[10])
                },
                "norms",
            ),
            (
                Step {
                    layer: 2,
                    ..step(&routing, &[10])
                },
                "layers",
            ),
        ];
        for (step, word) in cases {
            let error = step.rows(&meta()).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn bad_picks_are_refused() {
        for (experts, weights, word) in [([3], [1.0], "expert 3"), ([1], [f32::NAN], "NaN")] {
            let routing = routing(&[(&experts, &weights)]);
            let error = step(&routing, &[10]).rows(&meta()).unwrap_err().to_string();
            assert!(
                error.contains(word) && error.contains("seq 1, pos 5, layer 1"),
                "{error}"
            );
        }
    }
}
