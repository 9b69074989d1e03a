//! Where router logits come from: a matrix, a recurrence along the layers, a router that has run before them, or a draw.

use std::sync::Arc;

use cadre_kernels::{Compute, MatmulScratch, Matrix};
use cadre_routing::policies::Uniform;

use super::{Linear, Step};

/// What makes the logits of one layer, `[rows, n_logits]`.
#[derive(Debug)]
pub(crate) enum Router {
    /// One product with the layer's input; always f32.
    Linear(Linear),
    /// RMoE's, whose state comes from the layers below.
    Recurrent(Recurrent),
    /// A router for all layers, which has run before the first of them.
    Foretold(Foretold),
    /// Random numbers in place of logits.
    Random(Random),
}

/// A layer's part of the layerwise recurrent router (RMoE, arXiv 2408.06793): `u = input x`, `h' = GRU(u, h)`, logits
/// `gate h'`. The state `h` is a token's own; it starts at 0 below the first layer with experts and is forgotten above
/// the last, so that nothing goes from one position to another.
#[derive(Debug)]
pub(crate) struct Recurrent {
    /// `[width, d]`.
    pub(crate) input: Matrix,
    /// Shared by all layers.
    pub(crate) cell: Arc<GruCell>,
    /// `[n_logits, width]`.
    pub(crate) gate: Linear,
}

/// A gated recurrent unit in the layout of `torch.nn.GRUCell`: rows are those of reset, update and new, in this order.
#[derive(Debug)]
pub(crate) struct GruCell {
    /// `[3 width, width]`, of the input.
    pub(crate) input: Linear,
    /// `[3 width, width]`, of the state.
    pub(crate) state: Linear,
}

/// A layer's part of the logits that are there before the layers run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Foretold {
    /// The layer's first logit in a token's row of them.
    pub(crate) first: usize,
    pub(crate) n_logits: usize,
}

/// Random numbers that follow from seed, layer and position: a token's are the same in every pass.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Random {
    pub(crate) seed: u64,
    pub(crate) layer: usize,
    pub(crate) n_experts: usize,
}

/// What routers remember of a pass, and memory to compute in; empty for those that look at a layer's input alone.
#[derive(Debug, Default)]
pub(crate) struct RouterScratch {
    width: usize,
    /// `[rows, width]`: what the layers below have left.
    state: Vec<f32>,
    input: Vec<f32>,
    of_input: Vec<f32>,
    of_state: Vec<f32>,
    /// State of the rows of a look ahead, which leaves the real one alone.
    guessed: Vec<f32>,
    /// `[rows, n_foretold]`: what was said before the first layer.
    foretold: Vec<f32>,
    n_foretold: usize,
}

impl RouterScratch {
    /// For `capacity` rows, a state of `width` values, and `n_foretold` logits that are made before the layers; 0 without.
    pub(crate) fn new((width, n_foretold): (usize, usize), capacity: usize) -> Self {
        Self {
            width,
            foretold: vec![0.0; capacity * n_foretold],
            n_foretold,
            state: vec![0.0; capacity * width],
            input: vec![0.0; capacity * width],
            of_input: vec![0.0; 3 * capacity * width],
            of_state: vec![0.0; 3 * capacity * width],
            guessed: Vec::new(),
        }
    }

    /// Forgets what an earlier pass has left, for a pass of `n_rows`.
    pub(crate) fn begin(&mut self, n_rows: usize) {
        self.state[..n_rows * self.width].fill(0.0);
    }

    /// Moves the state of some rows, as the rows of the stream are moved.
    pub(crate) fn move_rows(&mut self, from: std::ops::Range<usize>, to: usize) {
        let width = self.width;
        self.state
            .copy_within(from.start * width..from.end * width, to * width);
        let n = self.n_foretold;
        self.foretold
            .copy_within(from.start * n..from.end * n, to * n);
    }

    /// Where the logits of `n_rows` go that are made before the layers.
    pub(crate) fn foretold(&mut self, n_rows: usize) -> &mut [f32] {
        &mut self.foretold[..n_rows * self.n_foretold]
    }
}

impl Router {
    /// Length of a row of logits.
    pub(crate) fn n_logits(&self) -> usize {
        match self {
            Self::Linear(gate) => gate.n_out(),
            Self::Recurrent(router) => router.gate.n_out(),
            Self::Foretold(part) => part.n_logits,
            Self::Random(random) => random.n_experts,
        }
    }

    /// Adds its matrices to `all`.
    pub(crate) fn matrices<'a>(&'a self, all: &mut Vec<&'a Matrix>) {
        match self {
            Self::Linear(gate) => gate.matrices(all),
            Self::Recurrent(router) => {
                all.push(&router.input);
                router.gate.matrices(all);
            }
            Self::Foretold(_) | Self::Random(_) => {}
        }
    }

    /// The matrices that all layers have together, if there are any.
    pub(crate) fn shared_matrices(&self) -> Option<[&Matrix; 2]> {
        match self {
            Self::Recurrent(router) => Some([&router.cell.input.weight, &router.cell.state.weight]),
            Self::Linear(_) | Self::Foretold(_) | Self::Random(_) => None,
        }
    }

    /// The logits of `x_td`. A recurrent router takes the state one layer on.
    pub(crate) fn forward(
        &self,
        step: Step<'_>,
        x_td: &[f32],
        logits: &mut [f32],
        (scratch, matmul): (&mut RouterScratch, &mut MatmulScratch),
    ) {
        match self {
            Self::Linear(gate) => gate.forward(step.compute, x_td, logits, matmul),
            Self::Recurrent(router) => {
                let n = step.n_rows() * scratch.width;
                let mut state = std::mem::take(&mut scratch.state);
                router.advance(step.compute, x_td, &mut state[..n], (scratch, matmul));
                let gate = &router.gate;
                gate.forward(step.compute, &state[..n], logits, matmul);
                scratch.state = state;
            }
            Self::Foretold(part) => part.copy(scratch, 0..step.n_rows(), logits),
            Self::Random(random) => random.fill(step, logits),
        }
    }

    /// As [`Router::forward`], for a guess at what this layer will say: the state stays where it is.
    pub(crate) fn guess(
        &self,
        step: Step<'_>,
        x_td: &[f32],
        logits: &mut [f32],
        (scratch, matmul): (&mut RouterScratch, &mut MatmulScratch),
    ) {
        let Self::Recurrent(router) = self else {
            return self.forward(step, x_td, logits, (scratch, matmul));
        };
        let n = step.n_rows() * scratch.width;
        let mut state = std::mem::take(&mut scratch.guessed);
        state.clear();
        state.extend_from_slice(&scratch.state[..n]);
        router.advance(step.compute, x_td, &mut state, (scratch, matmul));
        let gate = &router.gate;
        gate.forward(step.compute, &state, logits, matmul);
        scratch.guessed = state;
    }
}

impl Recurrent {
    /// `state = GRU(input x, state)`, `[rows, width]`.
    fn advance(
        &self,
        compute: &Compute,
        x_td: &[f32],
        state: &mut [f32],
        (scratch, matmul): (&mut RouterScratch, &mut MatmulScratch),
    ) {
        let (n, width) = (state.len(), scratch.width);
        let input = &mut scratch.input[..n];
        let (of_input, of_state) = (
            &mut scratch.of_input[..3 * n],
            &mut scratch.of_state[..3 * n],
        );
        compute.matmul(&self.input, x_td, input, matmul);
        self.cell.input.forward(compute, input, of_input, matmul);
        self.cell.state.forward(compute, state, of_state, matmul);
        let rows = state.chunks_exact_mut(width);
        let products = of_input
            .chunks_exact(3 * width)
            .zip(of_state.chunks_exact(3 * width));
        for (h, (of_input, of_state)) in rows.zip(products) {
            for (j, h) in h.iter_mut().enumerate() {
                let both = |part: usize| of_input[part + j] + of_state[part + j];
                let reset = sigmoid(both(0));
                let update = sigmoid(both(width));
                let new = (of_input[2 * width + j] + reset * of_state[2 * width + j]).tanh();
                *h = (1.0 - update) * new + update * *h;
            }
        }
    }
}

impl Foretold {
    /// The logits of `rows`, one after the other.
    pub(super) fn copy(
        &self,
        scratch: &RouterScratch,
        rows: impl Iterator<Item = usize>,
        logits: &mut [f32],
    ) {
        for (to, row) in logits.chunks_exact_mut(self.n_logits).zip(rows) {
            let from = row * scratch.n_foretold + self.first;
            to.copy_from_slice(&scratch.foretold[from..from + self.n_logits]);
        }
    }
}

impl Random {
    fn fill(&self, step: Step<'_>, logits: &mut [f32]) {
        for span in step.spans {
            for row in span.first_row..span.end() {
                let position = span.position_of(row);
                let row = &mut logits[row * self.n_experts..][..self.n_experts];
                for (expert, value) in row.iter_mut().enumerate() {
                    *value = Uniform::draw(self.seed, self.layer, position, expert);
                }
            }
        }
    }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

#[cfg(test)]
mod tests {
    use cadre_kernels::Kernels;
    use cadre_testkit::{Random as Values, assert_close};

    use super::*;
    use crate::batch::Span;

    fn linear(values: &mut Values, [n_out, n_in]: [usize; 2]) -> Linear {
        let weight = Matrix::from_f32(n_out, n_in, values.values(n_out * n_in, 0.6)).unwrap();
        let bias = Some(values.values(n_out, 0.3));
        Linear { weight, bias }
    }

    fn recurrent(values: &mut Values, cell: &Arc<GruCell>, d: usize, width: usize) -> Router {
        Router::Recurrent(Recurrent {
            input: Matrix::from_f32(width, d, values.values(width * d, 0.6)).unwrap(),
            cell: Arc::clone(cell),
            gate: linear(values, [3, width]),
        })
    }

    /// Two layers over `rows`, which begin at `position`; the state is moved as the stream would be.
    fn two_layers(routers: &[Router; 2], x: &[f32], rows: &[usize], d: usize) -> Vec<f32> {
        let compute = Compute::new(Kernels::detect(), 1);
        let mut scratch = RouterScratch::new((5, 0), 8);
        let mut matmul = MatmulScratch::default();
        // Something that an earlier pass has left.
        scratch.state.fill(3.0);
        scratch.begin(rows.len());
        let x: Vec<f32> = rows
            .iter()
            .flat_map(|row| x[row * d..][..d].to_vec())
            .collect();
        let spans = [Span {
            first_row: 0,
            n_rows: rows.len(),
            position: 0,
            n_ctx: 9,
        }];
        let step = Step {
            compute: &compute,
            layer: 0,
            spans: &spans,
            decodes: false,
            steering: &[],
        };
        let mut logits = vec![0.0; rows.len() * 3];
        for router in routers {
            let mut guess = vec![0.0; rows.len() * 3];
            router.guess(step, &x, &mut guess, (&mut scratch, &mut matmul));
            router.forward(step, &x, &mut logits, (&mut scratch, &mut matmul));
            assert_eq!(
                guess, logits,
                "a guess about this layer's own input comes true"
            );
        }
        logits
    }

    #[test]
    fn tokens_keep_their_own_state() {
        let (d, width) = (6, 5);
        let mut values = Values::new(4);
        let cell = Arc::new(GruCell {
            input: linear(&mut values, [3 * width, width]),
            state: linear(&mut values, [3 * width, width]),
        });
        let routers = [
            recurrent(&mut values, &cell, d, width),
            recurrent(&mut values, &cell, d, width),
        ];
        let x = values.values(4 * d, 1.0);
        let all = two_layers(&routers, &x, &[0, 1, 2, 3], d);
        for row in 0..4 {
            assert_eq!(two_layers(&routers, &x, &[row], d), all[row * 3..][..3]);
        }
        let turned = two_layers(&routers, &x, &[3, 0, 2, 1], d);
        assert_eq!(turned[..3], all[9..]);
        // The second layer sees the first one's state.
        let [_, second] = routers;
        let other = [recurrent(&mut values, &cell, d, width), second];
        assert_ne!(two_layers(&other, &x, &[0], d), all[..3]);
    }

    #[test]
    fn a_step_is_its_definition() {
        let (d, width) = (2, 2);
        let matrix = |n_out, values: &[f32]| {
            Matrix::from_f32(n_out, values.len() / n_out, values.to_vec()).unwrap()
        };
        let of = |values: &[f32], bias: &[f32]| Linear {
            weight: matrix(6, values),
            bias: Some(bias.to_vec()),
        };
        let w_ih = [
            0.1, 0.2, -0.3, 0.4, 0.5, -0.6, 0.7, 0.8, -0.9, 1.0, 0.2, 0.3,
        ];
        let w_hh = [
            0.3, -0.1, 0.2, 0.5, -0.4, 0.6, 0.1, -0.2, 0.8, 0.7, -0.5, 0.4,
        ];
        let (b_ih, b_hh) = (
            [0.1, -0.1, 0.2, 0.0, 0.3, -0.2],
            [0.0, 0.1, -0.3, 0.2, 0.1, 0.4],
        );
        let router = Recurrent {
            input: matrix(2, &[1.0, 0.0, 0.0, 1.0]),
            cell: Arc::new(GruCell {
                input: of(&w_ih, &b_ih),
                state: of(&w_hh, &b_hh),
            }),
            gate: Linear {
                weight: matrix(2, &[1.0, 0.0, 0.0, 1.0]),
                bias: None,
            },
        };
        let compute = Compute::new(Kernels::detect(), 1);
        let mut scratch = RouterScratch::new((width, 0), 1);
        let mut matmul = MatmulScratch::default();
        let (x, mut state) = ([0.5, -1.0], [0.25, -0.75]);
        assert_eq!(x.len(), d);
        router.advance(&compute, &x, &mut state, (&mut scratch, &mut matmul));
        // torch.nn.GRUCell with these weights, torch 2.15.
        assert_close("state", &state, &EXPECTED_STEP, 1e-6);
    }

    const EXPECTED_STEP: [f32; 2] = [-0.246_662_44, -0.561_294_85];

    #[test]
    fn what_was_foretold_moves_with_its_rows() {
        let mut scratch = RouterScratch::new((0, 5), 4);
        let all = scratch.foretold(3);
        all.iter_mut()
            .enumerate()
            .for_each(|(i, value)| *value = i as f32);
        let part = Foretold {
            first: 2,
            n_logits: 2,
        };
        let mut logits = [0.0; 4];
        part.copy(&scratch, 1..3, &mut logits);
        assert_eq!(logits, [7.0, 8.0, 12.0, 13.0]);
        scratch.move_rows(2..3, 0);
        part.copy(&scratch, 0..2, &mut logits);
        assert_eq!(logits, [12.0, 13.0, 7.0, 8.0]);
    }

    #[test]
    fn draws_follow_positions() {
        let random = Random {
            seed: 3,
            layer: 1,
            n_experts: 2,
        };
        let compute = Compute::new(Kernels::detect(), 1);
        let span = |first_row, n_rows, position| Span {
            first_row,
            n_rows,
            position,
            n_ctx: 99,
        };
        let spans = [span(0, 2, 7), span(2, 0, 1), span(2, 1, 8)];
        let step = Step {
            compute: &compute,
            layer: 1,
            spans: &spans,
            decodes: false,
            steering: &[],
        };
        let mut logits = [0.0; 6];
        random.fill(step, &mut logits);
        let draw = |expert| Uniform::draw(3, 1, 7, expert);
        assert_eq!(logits[..2], [draw(0), draw(1)]);
        assert_eq!(logits[2..4], logits[4..], "position 8 of two sequences");
    }
}
