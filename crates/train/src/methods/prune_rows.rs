//! Rows of experts in factors that are given up while the experts are tuned, the least important first.
//!
//! Paper: Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy, Li et al., 2023, arXiv
//! 2310.01334; the importance is that of PLATON (Zhang et al., 2022, arXiv 2206.12562) without its uncertainty, the schedule
//! that of LoSparse (Li et al., 2023, arXiv 2306.11222), which it takes over.
//! Rule: `W = U V + S`. After every step each row of every `S` has the importance `I = mean_j |s_j dLoss/ds_j|`, smoothed as
//! `Ibar <- 0.85 Ibar + 0.15 I`. Of the rows of all matrices the best stay, together at most the part `p(t)` of the values of
//! all whole matrices; the others become 0, and may come back. Of `T` steps, `p(t)` is 1 for `t <= Ti`, then
//! `P + (1 - P) (1 - (t - Ti) / (T - Ti - Tf))^3`, and `P` from `T - Tf` on.
//! Recipe: `[prune_rows] rest = P, initial_steps = Ti, final_steps = Tf`; the model that it starts from has all rows.
//! State: `Ibar`, in snapshots as `i.N`. What is exported has the rows that are left, of each matrix another number.
//! Differs from paper: `s` is what the gradient was taken at and counts at once (in the released code it is what the step
//! made of it, and counts a step later); where rows end inside of the part, the last one goes.
//! Check: methods::prune_rows::tests, tests/recover.rs.

use crate::layers::factored::Factored;
use crate::layers::moe::Moe;
use crate::lm::{FeedForward, LanguageModel};
use crate::methods::start::Part;
use crate::optimizer::GradientSum;
use crate::params::{set_values, values};
use crate::recipe::Recipe;
use burn::module::Param;
use burn::tensor::{Tensor, TensorData};
use serde::{Deserialize, Serialize};

/// How much of the old importance stays in a step.
const SMOOTHING: f32 = 0.85;

/// `[prune_rows]` of a recipe.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PruneRows {
    /// Part of the values of whole matrices that rows hold at the end, from 0 to less than 1.
    pub rest: f64,
    /// Steps before the first row goes.
    pub initial_steps: u64,
    /// Steps at the end that only tune what is left.
    pub final_steps: u64,
}

/// For every layer with experts its matrices, and for each of these, by expert, whether each of its rows stays.
type Kept = Vec<[Vec<Vec<bool>>; 3]>;

/// A row of some matrix.
struct Row {
    /// Index into the importances.
    matrix: usize,
    expert: usize,
    row: usize,
    importance: f32,
    n_values: usize,
}

impl PruneRows {
    /// The published shares of a run of `steps` steps: 400 and 1600 of 10,000.
    #[must_use]
    pub fn published(rest: f64, steps: u64) -> Self {
        Self {
            rest,
            initial_steps: steps / 25,
            final_steps: steps * 4 / 25,
        }
    }

    /// Refuses parts that are none, schedules that do not fit, and models without rows to give up.
    ///
    /// # Errors
    /// One sentence that names the key.
    pub fn check(&self, recipe: &Recipe) -> Result<(), String> {
        if !(0.0..1.0).contains(&self.rest) {
            return Err(format!(
                "`prune_rows.rest` = {}, expected from 0 to less than 1",
                self.rest
            ));
        }
        let (first, last, all) = (self.initial_steps, self.final_steps, recipe.train.steps);
        if first.checked_add(last).is_none_or(|sum| sum >= all) {
            return Err(format!(
                "`prune_rows.initial_steps` = {first} and `prune_rows.final_steps` = {last} leave none of the {all} steps of \
                 `train.steps` to give up rows in"
            ));
        }
        let frozen = |start: &crate::methods::start::Start| start.freeze.contains(&Part::Experts);
        if recipe.start.as_ref().is_some_and(frozen) {
            return Err(
                "`[prune_rows]` ranks rows by their gradients, and `start.freeze` names experts"
                    .to_owned(),
            );
        }
        let config = recipe.model_config();
        let Some(factors) = &config.moe.factors else {
            return Err(
                "`[prune_rows]` needs experts in factors (`model.factors`, `cadre plan factor --rest 1`)".to_owned(),
            );
        };
        let (d, width) = (config.hidden_size, config.moe.intermediate_size);
        let (mut have, mut whole) = (0, 0);
        for at in 0..config.moe.layers.len() {
            for expert in 0..config.moe.n_stored_at(at) {
                let [gate, up, down] = factors.rows_of(at, expert);
                have += (gate + up) * d + down * width;
                whole += 3 * d * width;
            }
        }
        let part = have as f64 / whole.max(1) as f64;
        if part <= self.rest {
            return Err(format!(
                "`prune_rows.rest` = {}, but the rows of the model hold only {part:.3} of its matrices: there is nothing to \
                 give up (`cadre plan factor --rest 1` keeps all)",
                self.rest
            ));
        }
        Ok(())
    }

    /// The part that rows may hold after step `step` of `steps`.
    #[must_use]
    pub fn part(&self, step: u64, steps: u64) -> f64 {
        let end = steps.saturating_sub(self.final_steps);
        if step <= self.initial_steps {
            return 1.0;
        }
        if step >= end {
            return self.rest;
        }
        let done = (step - self.initial_steps) as f64 / (end - self.initial_steps) as f64;
        self.rest + (1.0 - self.rest) * (1.0 - done).powi(3)
    }

    /// Sets the rows to 0 that do not stay after step `step` of `steps`; says which part of the values of whole matrices
    /// the others hold.
    pub(crate) fn prune(
        &self,
        (step, steps): (u64, u64),
        importance: &[Vec<f32>],
        model: &mut LanguageModel,
    ) -> f64 {
        let (kept, part) = self.kept((step, steps), importance, model);
        if self.part(step, steps) >= 1.0 {
            return part;
        }
        for (moe, kept) in layers_mut(model).zip(&kept) {
            let Some(thin) = &mut moe.thin else { continue };
            for ((_, matrix), kept) in thin.parts_mut().into_iter().zip(kept) {
                clear(matrix, kept);
            }
        }
        part
    }

    /// The rows that stay after step `step` of `steps`, and the part of the values of whole matrices that they hold.
    fn kept(
        &self,
        (step, steps): (u64, u64),
        importance: &[Vec<f32>],
        model: &LanguageModel,
    ) -> (Kept, f64) {
        let (mut rows, mut whole, mut kept) = (Vec::new(), 0, Kept::new());
        for (at, moe) in layers(model).enumerate() {
            let mut of_layer: [Vec<Vec<bool>>; 3] = Default::default();
            for (part, matrix) in matrices(moe).into_iter().enumerate() {
                let [n_experts, n_rows, n_in, n_out] = sizes(matrix);
                whole += n_experts * n_out * n_in;
                let of_matrix = &importance[3 * at + part];
                for (expert, own) in matrix.rows.iter().enumerate() {
                    rows.extend((0..own.len()).map(|row| Row {
                        matrix: 3 * at + part,
                        expert,
                        row,
                        importance: of_matrix[expert * n_rows + row],
                        n_values: n_in,
                    }));
                    of_layer[part].push(vec![false; own.len()]);
                }
            }
            kept.push(of_layer);
        }
        // Stable: of equals the first stay.
        rows.sort_by(|a, b| b.importance.total_cmp(&a.importance));
        // A part that is not a binary fraction may miss whole numbers by a little.
        let room = (self.part(step, steps) * whole as f64 + 1e-6) as usize;
        let mut held = 0;
        for row in rows {
            if held + row.n_values > room {
                break;
            }
            held += row.n_values;
            kept[row.matrix / 3][row.matrix % 3][row.expert][row.row] = true;
        }
        (kept, held as f64 / whole.max(1) as f64)
    }

    /// Takes the rows out of `model` that do not stay after the last of `steps` steps; says how many are left of each matrix.
    #[must_use]
    pub(crate) fn finish(
        &self,
        steps: u64,
        importance: &[Vec<f32>],
        model: &mut LanguageModel,
    ) -> Vec<Vec<[usize; 3]>> {
        let (kept, _) = self.kept((steps, steps), importance, model);
        let mut counts = Vec::with_capacity(kept.len());
        for (moe, kept) in layers_mut(model).zip(&kept) {
            let Some(thin) = &mut moe.thin else { continue };
            let parts = thin.parts_mut().into_iter();
            for ((_, matrix), kept) in parts.zip(kept) {
                *matrix = without(matrix, kept);
            }
            let n_experts = thin.gate.rows.len();
            let of = |expert: usize| thin.parts().map(|(_, matrix)| matrix.rows[expert].len());
            counts.push((0..n_experts).map(of).collect());
        }
        counts
    }
}

/// Importances of a run that begins, 0 for all rows: for every layer with experts one list for each of its gate, up and down
/// matrices, `[E, rows]`.
#[must_use]
pub(crate) fn zeros(model: &LanguageModel) -> Vec<Vec<f32>> {
    let of = |matrix: &Factored| {
        let [n_experts, n_rows, ..] = sizes(matrix);
        vec![0.0; n_experts * n_rows]
    };
    layers(model).flat_map(matrices).map(of).collect()
}

/// Takes a step's gradients into `importance`; `model` is what they were taken at.
pub(crate) fn observe(importance: &mut [Vec<f32>], model: &LanguageModel, gradients: &GradientSum) {
    let layers = model.layers.iter().enumerate();
    let moes = layers.filter_map(|(layer, one)| match &one.mlp {
        FeedForward::Moe(moe) => Some((layer, moe)),
        FeedForward::Dense(_) => None,
    });
    let parts = ["gate", "up", "down"];
    let all = moes.flat_map(|(layer, moe)| {
        let matrices = matrices(moe).into_iter().zip(parts);
        matrices.map(move |(matrix, part)| (layer, part, matrix))
    });
    for (importance, (layer, part, matrix)) in importance.iter_mut().zip(all) {
        let path = format!("layers.{layer}.mlp.Moe.thin.{part}.inner");
        let gradient = gradients.get(&path);
        let [_, n_rows, n_in, _] = sizes(matrix);
        let inner = values(&matrix.inner.val());
        let n_inner = matrix.inner.val().dims()[1];
        let now = |at: usize| -> f32 {
            // Without tokens in a step, an expert has no gradient, or zeros.
            let Some(gradient) = gradient else { return 0.0 };
            let (expert, row) = (at / n_rows, at % n_rows);
            let first = (expert * n_inner + (n_inner - n_rows) + row) * n_in;
            let pairs = inner[first..first + n_in].iter();
            let sum: f64 = pairs
                .zip(&gradient[first..first + n_in])
                .map(|(s, g)| f64::from(s * g).abs())
                .sum();
            (sum / n_in as f64) as f32
        };
        for (at, smooth) in importance.iter_mut().enumerate() {
            *smooth = SMOOTHING * *smooth + (1.0 - SMOOTHING) * now(at);
        }
    }
}

/// Layers with experts.
fn layers(model: &LanguageModel) -> impl Iterator<Item = &Moe> {
    model.layers.iter().filter_map(|layer| match &layer.mlp {
        FeedForward::Moe(moe) => Some(moe),
        FeedForward::Dense(_) => None,
    })
}

fn layers_mut(model: &mut LanguageModel) -> impl Iterator<Item = &mut Moe> {
    model
        .layers
        .iter_mut()
        .filter_map(|layer| match &mut layer.mlp {
            FeedForward::Moe(moe) => Some(moe),
            FeedForward::Dense(_) => None,
        })
}

/// The gate, up and down matrices of a layer in factors.
fn matrices(moe: &Moe) -> Vec<&Factored> {
    let thin = moe.thin.iter();
    thin.flat_map(|thin| thin.parts().map(|(_, matrix)| matrix))
        .collect()
}

/// Experts, the most rows of one, inputs and outputs.
fn sizes(matrix: &Factored) -> [usize; 4] {
    let ([n_experts, n_inner, n_in], [_, n_out, rank]) =
        (matrix.inner.val().dims(), matrix.outer.val().dims());
    [n_experts, n_inner - rank, n_in, n_out]
}

/// Sets the rows of `matrix` to 0 that are not `kept`.
fn clear(matrix: &mut Factored, kept: &[Vec<bool>]) {
    let [_, n_rows, n_in, _] = sizes(matrix);
    let mut inner = values(&matrix.inner.val());
    let n_inner = matrix.inner.val().dims()[1];
    for (expert, kept) in kept.iter().enumerate() {
        for (row, _) in kept.iter().enumerate().filter(|(_, kept)| !**kept) {
            let first = (expert * n_inner + (n_inner - n_rows) + row) * n_in;
            inner[first..first + n_in].fill(0.0);
        }
    }
    set_values(&mut matrix.inner, inner);
}

/// `matrix` with the `kept` rows; experts with fewer than others have zeros behind theirs.
fn without(matrix: &Factored, kept: &[Vec<bool>]) -> Factored {
    let [n_experts, n_rows, n_in, _] = sizes(matrix);
    let inner = values(&matrix.inner.val());
    let n_inner = matrix.inner.val().dims()[1];
    let rank = n_inner - n_rows;
    let stay = |kept: &[bool]| -> Vec<usize> { (0..kept.len()).filter(|row| kept[*row]).collect() };
    let staying: Vec<Vec<usize>> = kept.iter().map(|kept| stay(kept)).collect();
    let most = staying.iter().map(Vec::len).max().unwrap_or(0);
    let mut left = Vec::with_capacity(n_experts * (rank + most) * n_in);
    for (expert, staying) in staying.iter().enumerate() {
        let own = &inner[expert * n_inner * n_in..][..n_inner * n_in];
        left.extend_from_slice(&own[..rank * n_in]);
        for row in staying {
            left.extend_from_slice(&own[(rank + row) * n_in..][..n_in]);
        }
        left.resize((expert + 1) * (rank + most) * n_in, 0.0);
    }
    let left = TensorData::new(left, [n_experts, rank + most, n_in]);
    let device = matrix.inner.val().device();
    let rows = matrix.rows.iter().zip(&staying);
    Factored {
        inner: Param::from_tensor(Tensor::from_data(left, &device)),
        outer: matrix.outer.clone(),
        rows: rows
            .map(|(places, staying)| staying.iter().map(|row| places[*row]).collect())
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::init::Init;
    use crate::lm::{Batch, Pass};
    use burn::tensor::Device;
    use std::path::Path;
    use std::sync::Arc;

    /// One layer of two experts in factors of rank 1, with all rows: 3 of 4 values (gate, up), and 4 of 3 (down).
    fn tiny() -> (Recipe, LanguageModel) {
        let text = "name = \"tiny\"\n[model]\nvocab_size = 8\nhidden_size = 4\nn_layers = 1\nn_heads = 1\nn_kv_heads = 1\n\
             head_dim = 4\nn_experts = 2\ntop_k = 2\nmoe_intermediate_size = 3\nmax_position_embeddings = 8\n\
             initializer_range = 0.5\nfactors = { rank = 1, up_rows = 3, down_rows = 4 }\n\
             [train]\nsteps = 9\nbatch_size = 1\nseq_len = 4\nlr = 1e-3\n[output]\ndir = \"x\"\n";
        let recipe = Recipe::parse(Path::new("tiny.toml"), text).unwrap();
        let init = Init {
            seed: 1,
            std: recipe.model.initializer_range,
            device: Device::flex().autodiff(),
        };
        let model = LanguageModel::init(&recipe.architecture().unwrap(), &init);
        (recipe, model)
    }

    fn loss(recipe: &Recipe, model: &LanguageModel) -> Tensor<1> {
        let batch = Batch {
            tokens: Arc::new(vec![1, 5, 2, 7]),
            targets: Arc::new(vec![5, 2, 7, 3]),
            seq_len: 4,
        };
        let architecture = recipe.architecture().unwrap();
        let losses = model.losses(&architecture, &batch, &Pass::default());
        losses.unwrap().cross_entropy
    }

    /// The matrix `part` (gate, up, down) of the only layer.
    fn matrix(model: &mut LanguageModel, part: usize) -> &mut Factored {
        let moe = layers_mut(model).next().unwrap();
        let [gate, up, down] = moe.thin.as_mut().unwrap().parts_mut();
        [gate.1, up.1, down.1].into_iter().nth(part).unwrap()
    }

    #[test]
    fn importance_is_what_finite_differences_say_and_is_smoothed() {
        let (recipe, model) = tiny();
        let mut gradients = GradientSum::default();
        gradients
            .add(&model, &mut loss(&recipe, &model).backward(), 1.0)
            .unwrap();
        let mut importance = zeros(&model);
        assert_eq!(
            importance.iter().map(Vec::len).collect::<Vec<_>>(),
            [6, 6, 8]
        );
        observe(&mut importance, &model, &gradients);
        for (part, importance) in importance.iter().enumerate() {
            for (at, found) in importance.iter().enumerate() {
                let inner = values(&matrix(&mut model.clone(), part).inner.val());
                let [n_experts, n_rows, n_in, _] = sizes(matrix(&mut model.clone(), part));
                let n_inner = inner.len() / n_experts / n_in;
                let first = (at / n_rows * n_inner + 1 + at % n_rows) * n_in;
                let step = 0.02;
                let slope = |value: usize| {
                    let at = |off: f32| {
                        let mut moved = model.clone();
                        let mut changed = inner.clone();
                        changed[value] += off;
                        set_values(&mut matrix(&mut moved, part).inner, changed);
                        loss(&recipe, &moved).into_scalar::<f32>()
                    };
                    (at(step) - at(-step)) / (2.0 * step)
                };
                let terms = (first..first + n_in).map(|value| (inner[value] * slope(value)).abs());
                let expected = 0.15 * terms.sum::<f32>() / n_in as f32;
                assert!(
                    (found - expected).abs() < 2e-5 + 0.02 * expected,
                    "{part}, {at}: {found}, expected {expected}"
                );
            }
        }
        let once = importance.clone();
        observe(&mut importance, &model, &gradients);
        let pairs = importance.iter().flatten().zip(once.iter().flatten());
        assert!(pairs.clone().any(|(_, once)| *once > 1e-3));
        // 0.85 x 0.15 I + 0.15 I.
        assert!(
            pairs
                .into_iter()
                .all(|(twice, once)| (twice - 1.85 * once).abs() < 1e-6)
        );
    }

    #[test]
    fn the_best_rows_of_all_matrices_stay_and_the_others_are_zeros() {
        let (_, mut model) = tiny();
        let rule = PruneRows {
            rest: 0.25,
            initial_steps: 2,
            final_steps: 2,
        };
        // Matrices have 72 values in all, of which rows may hold 18 at the end: 4 of gate or up are 16, 6 of down are 18.
        let mut importance = zeros(&model);
        importance[1][2] = 5.0;
        importance[2][7] = 4.0;
        importance[0][3] = 3.0;
        importance[2][0] = 2.0;
        importance[0][0] = 1.0;
        let before = values(&matrix(&mut model, 1).inner.val());
        assert_eq!(rule.prune((2, 9), &importance, &mut model), 1.0);
        assert_eq!(values(&matrix(&mut model, 1).inner.val()), before);
        // 4 + 3 + 4 + 3 + 4.
        assert_eq!(rule.prune((9, 9), &importance, &mut model), 18.0 / 72.0);
        let after = values(&matrix(&mut model, 1).inner.val());
        // Of 2 experts with an inner row and 3 others, the second expert's have gone, and the first's but for the last.
        for (at, (before, after)) in before.chunks(4).zip(after.chunks(4)).enumerate() {
            match [0, 3, 4].contains(&at) {
                true => assert_eq!(before, after),
                false => assert_eq!(after, [0.0; 4]),
            }
        }
        let counts = rule.finish(9, &importance, &mut model);
        assert_eq!(counts, [[[1, 1, 1], [1, 0, 1]]]);
        assert_eq!(matrix(&mut model, 0).rows, [vec![0], vec![0]]);
        assert_eq!(matrix(&mut model, 1).rows, [vec![2], vec![]]);
        assert_eq!(matrix(&mut model, 2).rows, [vec![0], vec![3]]);
        let left = values(&matrix(&mut model, 1).inner.val());
        assert_eq!(left[..8], [&before[..4], &before[12..16]].concat()[..]);
        assert_eq!(left[8..], [&before[16..20], &[0.0; 4]].concat()[..]);
    }

    #[test]
    fn what_cannot_work_is_refused_by_key() {
        let (recipe, _) = tiny();
        let rule = PruneRows {
            rest: 0.5,
            initial_steps: 1,
            final_steps: 2,
        };
        rule.check(&recipe).unwrap();
        let refused = |rule: PruneRows, recipe: &Recipe, words: &str| {
            let text = rule.check(recipe).unwrap_err();
            assert!(text.contains(words), "{text}");
        };
        for rest in [1.0, -0.1, f64::NAN] {
            refused(PruneRows { rest, ..rule }, &recipe, "prune_rows.rest");
        }
        let long = PruneRows {
            initial_steps: u64::MAX,
            ..rule
        };
        refused(long, &recipe, "prune_rows.initial_steps");
        let long = PruneRows {
            final_steps: 8,
            ..rule
        };
        refused(long, &recipe, "leave none of the 9 steps");
        let mut other = recipe.clone();
        other.start = Some(crate::methods::start::Start {
            from: None,
            freeze: vec![Part::Experts],
        });
        refused(rule, &other, "start.freeze");
        let mut other = recipe.clone();
        other.model.factors = None;
        refused(rule, &other, "needs experts in factors");
        let mut other = recipe.clone();
        let factors = other.model.factors.as_mut().unwrap();
        (factors.up_rows, factors.down_rows) = (1, 1);
        refused(rule, &other, "hold only 0.306 of its matrices");
    }

    #[test]
    fn the_schedule_falls_from_all_to_the_rest() {
        let rule = PruneRows::published(0.1, 10_000);
        assert_eq!((rule.initial_steps, rule.final_steps), (400, 1600));
        let part = |step| rule.part(step, 10_000);
        assert_eq!([part(0), part(1), part(400)], [1.0; 3]);
        assert_eq!([part(8400), part(9000), part(10_000)], [0.1; 3]);
        // Half of the way: 0.1 + 0.9 / 8.
        assert!((part(4400) - 0.2125).abs() < 1e-12);
        assert!(part(401) < 1.0 && part(8399) > 0.1);
        assert!((0..10_000).all(|step| part(step) >= part(step + 1)));
        // Without a beginning and an end the last step has the rest.
        let bare = PruneRows {
            rest: 0.25,
            initial_steps: 0,
            final_steps: 0,
        };
        assert_eq!([bare.part(0, 2), bare.part(2, 2)], [1.0, 0.25]);
        assert!((bare.part(1, 2) - (0.25 + 0.75 / 8.0)).abs() < 1e-12);
    }
}
