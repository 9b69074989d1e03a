//! A training pass that keeps the inputs of layers only and computes each layer again on the way back
//! (`train.recompute = "layer"`).
//!
//! Paper: Training Deep Nets with Sublinear Memory Cost, Chen et al., 2016, arXiv 1604.06174.
//! Forward, the model is run without gradients, up to the last layer's output (with the operations of autodiff: those
//! without it round otherwise in places). Back, from the last layer to the first, a layer's graph is made anew from its
//! input, and goes backward from `sum(output * gradient of the output)` and the router losses of that layer. Routers see
//! the same context both times, so they draw and decide the same.
//! The gradients are those of the whole graph to the bit: where several reach one tensor, they are added in the same
//! order. The one exception is `router_gru.bias_ih`, to which a graph adds the layers from the first to the last.
//! `tests::gradients_are_those_of_the_whole_graph` holds that.

use crate::architecture::Architecture;
use crate::lm::{Batch, Forward, LanguageModel, Pass, Walk};
use crate::losses::{self, LossWeights};
use crate::optimizer::GradientSum;
use burn::module::Module;
use burn::tensor::{Gradients, Tensor};
use cadre_routing::{Loads, RoutingError};

/// What stays of a pass.
#[derive(Debug)]
pub(crate) struct Kept {
    /// Per layer, without a graph.
    inputs: Vec<Input>,
    /// The last layer's output; the graph of the losses begins here.
    top: Tensor<2>,
}

/// What a layer was given.
#[derive(Debug)]
struct Input {
    /// `[T, d_model]`.
    x: Tensor<2>,
    /// The recurrent router's state `[T, p]`.
    state: Option<Tensor<2>>,
}

/// What a pass was made of; the same for both ways.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Replay<'a> {
    pub(crate) model: &'a LanguageModel,
    pub(crate) architecture: &'a Architecture,
    pub(crate) batch: &'a Batch,
    pub(crate) pass: &'a Pass<'a>,
    pub(crate) weights: LossWeights,
    /// Whether something other than text and router losses reaches the hidden states.
    pub(crate) further: bool,
}

/// Hidden states and routing, as [`LanguageModel::forward`] makes them, and what stays.
///
/// # Errors
/// Router logits that are not finite.
pub(crate) fn forward(
    model: &LanguageModel,
    architecture: &Architecture,
    batch: &Batch,
    pass: &Pass<'_>,
) -> Result<(Forward, Kept), RoutingError> {
    let bare = model.clone().no_grad();
    let walk = Walk::new(&bare, architecture, batch, pass);
    let (mut x, mut state) = (bare.embedded(batch), bare.router_start(batch));
    let (mut inputs, mut decided) = (Vec::new(), Vec::new());
    for index in 0..bare.layers.len() {
        inputs.push(Input {
            x: x.clone().inner(),
            state: state.clone().map(Tensor::inner),
        });
        let (next, picks) = walk.layer(index, x, state.as_mut())?;
        x = next;
        decided.push(picks);
    }
    let top = x.inner().autodiff().require_grad();
    let forward = Walk::new(model, architecture, batch, pass).finish(top.clone(), decided);
    Ok((forward, Kept { inputs, top }))
}

impl Kept {
    /// Adds the gradients of all layers and of the embedding to `into`. `gradients` are those of the losses on the
    /// hidden states, `loads` what the balance losses counted.
    ///
    /// # Errors
    /// As [`forward`], which has already seen the same logits.
    pub(crate) fn backward(
        self,
        replay: &Replay<'_>,
        loads: &[Loads],
        gradients: &mut Gradients,
        into: &mut GradientSum,
    ) -> Result<(), RoutingError> {
        let Some(mut dx) = self.top.grad_remove(gradients) else {
            return Ok(());
        };
        let mut dstate = None;
        for (index, input) in self.inputs.into_iter().enumerate().rev() {
            let x = input.x.autodiff().require_grad();
            let state = input.state.map(|state| state.autodiff().require_grad());
            let loss = replay.layer(index, (x.clone(), state.clone()), (dx, dstate), loads)?;
            let mut gradients = loss.backward();
            into.add(replay.model, &mut gradients, 1.0)?;
            dx = x.grad_remove(&mut gradients).expect("a layer's input");
            dstate = state.and_then(|state| state.grad_remove(&mut gradients));
        }
        let loss = (replay.model.embedded(replay.batch) * dx).sum();
        into.add(replay.model, &mut loss.backward(), 1.0)
    }
}

impl Replay<'_> {
    /// What goes backward through layer `index`.
    fn layer(
        &self,
        index: usize,
        (x, mut state): (Tensor<2>, Option<Tensor<2>>),
        (dx, dstate): (Tensor<2>, Option<Tensor<2>>),
        loads: &[Loads],
    ) -> Result<Tensor<1>, RoutingError> {
        let walk = Walk::new(self.model, self.architecture, self.batch, self.pass);
        let (y, decided) = walk.layer(index, x, state.as_mut())?;
        let mut main = (y * dx).sum();
        if let (Some(state), Some(dstate)) = (state, dstate) {
            main = main + (state * dstate).sum();
        }
        let moe = &self.architecture.moe;
        let nth = moe.iter().position(|rule| rule.layer == index);
        let (Some(nth), Some(decided)) = (nth, decided.moe) else {
            return Ok(main);
        };
        let (n, weights) = (moe.len() as f32, self.weights);
        let even = moe[nth].router.balance(&decided, &loads[nth], false) / n * weights.balance;
        let z = losses::z_loss(decided.logits.clone()) / n * weights.z;
        let seq_len = self.batch.seq_len;
        let rarer = losses::further(&weights, &*moe[nth].router, &decided, seq_len)?;
        // A graph is walked from its last part to its first. In the whole one, the losses of the last router come before
        // what is above it, and those of the others after; further losses are the last part, and the way to all layers.
        let first = nth + 1 == moe.len() && !self.further;
        let own = match first {
            true => main.clone() + even + z,
            false => even + z,
        };
        let rarer = rarer.into_iter();
        let own = rarer.fold(own, |own, (_, weight, part)| own + part / n * weight);
        Ok(match first {
            true => own,
            false => own + main,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data;
    use crate::init::Init;
    use crate::methods::balance_scope::{Scope, ScopedLoads};
    use crate::objective::Objective;
    use crate::ops::{Numerics, Precision, Recompute};
    use crate::recipe::Recipe;
    use burn::tensor::Device;
    use std::path::Path;

    /// Five layers, the second and the last dense.
    fn recipe(model: &str, rest: &str) -> Recipe {
        let text = format!(
            r#"
            name = "tiny"
            [model]
            vocab_size = 60
            hidden_size = 16
            n_layers = 5
            n_heads = 4
            n_kv_heads = 2
            head_dim = 8
            n_experts = 4
            moe_intermediate_size = 8
            intermediate_size = 12
            mlp_only_layers = [1, 4]
            max_position_embeddings = 64
            initializer_range = 0.3
            {model}
            [train]
            steps = 4
            batch_size = 3
            seq_len = 9
            accumulate = 3
            lr = 1e-3
            {rest}
            [output]
            dir = "runs/tiny"
            "#
        );
        Recipe::parse(Path::new("tiny.toml"), &text).unwrap()
    }

    /// Loss and gradients of a step of three micro-batches.
    fn step(recipe: &Recipe, recompute: Recompute) -> (Vec<f64>, GradientSum) {
        let architecture = recipe.architecture().unwrap();
        let init = Init {
            seed: 3,
            std: recipe.model.initializer_range,
            device: Device::flex().autodiff(),
        };
        let model = LanguageModel::init(&architecture, &init);
        let biases: Vec<Vec<f32>> = architecture
            .moe
            .iter()
            .filter(|moe| moe.router.takes_bias())
            .map(|moe| {
                (0..moe.router.n_experts())
                    .map(|e| 0.1 * e as f32)
                    .collect()
            })
            .collect();
        let objective = Objective {
            architecture: &architecture,
            weights: recipe.losses,
            teacher: None,
            guide: None,
        };
        let mut scoped = ScopedLoads::new(Scope::Buffer);
        let (mut losses, mut sum) = (Vec::new(), GradientSum::default());
        for index in 0..3 {
            let batch = data::random_batch(recipe, 1, index);
            let pass = Pass {
                seed: 3,
                step: 1,
                index,
                training: true,
                biases: &biases,
                numerics: Numerics {
                    precision: Precision::F32,
                    recompute,
                },
                detached: false,
            };
            let parts = objective.of(&model, &batch, &pass, &mut scoped).unwrap();
            losses.extend([parts.cross_entropy, parts.balance, parts.z]);
            let of = (&model, &batch, &pass);
            objective
                .add_gradients(of, parts, 1.0 / 3.0, &mut sum)
                .unwrap();
        }
        (losses, sum)
    }

    #[test]
    fn gradients_are_those_of_the_whole_graph() {
        let losses = "[losses]\nbalance = 0.1\nz = 0.05\n";
        let router = |keys: &str| format!("{losses}\n[router]\n{keys}");
        for (model, rest) in [
            ("top_k = 2", losses.to_owned()),
            ("top_k = 2\ntie_word_embeddings = true", losses.to_owned()),
            ("top_k = 2\nrecurrent_router = 6", losses.to_owned()),
            (
                "top_k = 2\nattention_experts = { n_experts = 2, top_k = 1 }",
                losses.to_owned(),
            ),
            (
                "top_k = 2\nshared_intermediate_size = 6\nresidual = 'learned'",
                losses.to_owned(),
            ),
            ("top_k = 2", format!("{losses}consistency = 0.5")),
            ("top_k = 2", format!("{losses}entropy = 0.3")),
            (
                "top_k = 2",
                format!(
                    "{losses}entropy = 0.3\nsequence = 0.2\ndevice = 0.4\ncommunication = 0.5\n\n[router]\n\
                     name = 'group_limited'\nn_groups = 2\nkeep_groups = 1"
                ),
            ),
            (
                "top_k = 2\nrecurrent_router = 6\nrecurrent_restarts = true",
                losses.to_owned(),
            ),
            ("", router("name = 'switch'\ncapacity = { factor = 0.8 }")),
            ("", router("name = 'top_p'\ntop_p = 0.6")),
            ("top_k = 2", router("name = 'null_experts'\nn_null = 3")),
            (
                "top_k = 2\nshared_intermediate_size = 6",
                router("name = 'group_limited'\nn_groups = 2\nkeep_groups = 1\nscore = 'sigmoid'"),
            ),
            ("top_k = 2", router("name = 'sparse_mixer'")),
            ("", router("name = 'dense_to_sparse'\nnoise = true")),
            ("top_k = 2", router("name = 'uniform'")),
        ] {
            let recipe = recipe(model, &rest);
            let (whole, layer) = (
                step(&recipe, Recompute::None),
                step(&recipe, Recompute::Layer),
            );
            assert_eq!(whole.0, layer.0, "{model} {rest}");
            assert!(whole.0.iter().all(|x| x.is_finite()));
            assert!(whole.1.norm() > 0.0);
            for path in whole.1.paths().chain(layer.1.paths()) {
                let (a, b) = (whole.1.get(path).unwrap(), layer.1.get(path).unwrap());
                let equal = match path == "router_gru.bias_ih" {
                    true => a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6),
                    false => a == b,
                };
                assert!(equal, "{path}: {model} {rest}");
            }
        }
    }
}
