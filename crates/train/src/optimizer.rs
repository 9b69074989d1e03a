//! AdamW with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101) and clipping by global norm.
//!
//! One pass per tensor, in place: a step moves seven values per parameter and allocates nothing.
//! Matrices decay, vectors (norms) do not. An expert without tokens in a step has gradient zero and is updated
//! like any other parameter, as in the reference frameworks.

use crate::device::read;
use burn::backend::Flex;
use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Device, Gradients, Tensor, TensorData};
use cadre_routing::RoutingError;
use rayon::prelude::*;
use std::collections::BTreeMap;

/// Values per task.
const CHUNK: usize = 1 << 15;

/// Constants of the optimizer.
#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamWConfig {
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled decay of matrices, times the learning rate.
    pub weight_decay: f32,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
        }
    }
}

/// First and second moment of one tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments {
    /// Mean of gradients.
    pub first: Vec<f32>,
    /// Mean of squared gradients.
    pub second: Vec<f32>,
}

/// The optimizer's state: moments by parameter path, and the number of steps taken.
#[derive(Clone, Debug)]
pub struct AdamW {
    config: AdamWConfig,
    /// Steps taken.
    pub step: u64,
    /// Moments by parameter path.
    pub moments: BTreeMap<String, Moments>,
}

/// Gradients by parameter path, summed over the micro-batches of a step.
#[derive(Debug, Default)]
pub struct GradientSum {
    sums: BTreeMap<String, Vec<f32>>,
}

impl GradientSum {
    /// Adds `scale` times the gradients of one backward pass.
    ///
    /// # Errors
    /// A device that did not compute them; some may have been added then.
    pub fn add<M: Module>(
        &mut self,
        model: &M,
        gradients: &mut Gradients,
        scale: f32,
    ) -> Result<(), RoutingError> {
        let mut collector = Collector {
            path: Vec::new(),
            gradients,
            scale,
            into: self,
            failed: Ok(()),
        };
        model.visit(&mut collector);
        collector.failed
    }

    /// Adds `scale` times the sums of `other`.
    pub fn merge(&mut self, other: Self, scale: f32) {
        for (path, values) in other.sums {
            self.add_to(path, values, scale);
        }
    }

    fn add_to(&mut self, path: String, mut values: Vec<f32>, scale: f32) {
        match self.sums.get_mut(&path) {
            Some(sum) => crate::ops::add_scaled(sum, scale, &values),
            None => {
                if scale != 1.0 {
                    values.iter_mut().for_each(|g| *g *= scale);
                }
                self.sums.insert(path, values);
            }
        }
    }

    /// Drops the gradients of all paths that `keep` refuses: those parameters do not move.
    pub fn retain(&mut self, keep: impl Fn(&str) -> bool) {
        self.sums.retain(|path, _| keep(path));
    }

    /// Euclidean norm over all parameters.
    #[must_use]
    pub fn norm(&self) -> f64 {
        self.norms().0
    }

    /// Euclidean norms: over all parameters, and of each part of the model (`layer 3`, `embed_tokens`, ...) in the order
    /// of the forward pass.
    #[must_use]
    pub fn norms(&self) -> (f64, Vec<(String, f64)>) {
        let squares = |values: &Vec<f32>| -> f64 {
            let parts: Vec<f64> = values
                .par_chunks(CHUNK)
                .map(|chunk| f64::from(crate::ops::dot(chunk, chunk)))
                .collect();
            parts.iter().sum()
        };
        let (mut all, mut parts) = (0.0, BTreeMap::new());
        for (path, values) in &self.sums {
            let square = squares(values);
            all += square;
            *parts.entry(part(path)).or_insert(0.0) += square;
        }
        let parts = parts.into_iter();
        let named = parts.map(|((_, name), square)| (name, f64::sqrt(square)));
        (all.sqrt(), named.collect())
    }

    /// The parameters that have a gradient.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        self.sums.keys().map(String::as_str)
    }

    /// The sum of one parameter's gradients.
    #[must_use]
    pub fn get(&self, path: &str) -> Option<&[f32]> {
        self.sums.get(path).map(Vec::as_slice)
    }
}

/// Place in the forward pass and name of the part that a parameter belongs to.
fn part(path: &str) -> (usize, String) {
    let mut names = path.split('.');
    let first = names.next().unwrap_or_default();
    let layer = names.next().and_then(|index| index.parse::<usize>().ok());
    match (first, layer) {
        ("layers", Some(layer)) => (layer + 1, format!("layer {layer}")),
        ("embed_tokens", _) => (0, first.to_owned()),
        _ => (usize::MAX, first.to_owned()),
    }
}

struct Collector<'a> {
    path: Vec<String>,
    gradients: &'a mut Gradients,
    scale: f32,
    into: &'a mut GradientSum,
    failed: Result<(), RoutingError>,
}

impl ModuleVisitor for Collector<'_> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(gradient) = param.val().grad_remove(self.gradients) else {
            return;
        };
        match read(gradient) {
            Ok(values) => self.into.add_to(self.path.join("."), values, self.scale),
            Err(error) => self.failed = Err(error),
        }
    }
}

impl AdamW {
    /// No steps taken, no moments.
    #[must_use]
    pub fn new(config: AdamWConfig) -> Self {
        Self {
            config,
            step: 0,
            moments: BTreeMap::new(),
        }
    }

    /// One update at learning rate `lr` with the gradients times `scale` (the clipping factor).
    #[must_use]
    pub fn step<M: Module>(&mut self, model: M, gradients: GradientSum, lr: f64, scale: f64) -> M {
        self.step += 1;
        let t = self.step as f64;
        let correction = |beta: f32| 1.0 - f64::from(beta).powf(t);
        let constants = Constants {
            config: self.config,
            scale: scale as f32,
            rate: (lr / correction(self.config.beta1)) as f32,
            second: (1.0 / correction(self.config.beta2).sqrt()) as f32,
            keep: 1.0 - (lr * f64::from(self.config.weight_decay)) as f32,
        };
        model.map(&mut Updater {
            path: Vec::new(),
            moments: &mut self.moments,
            gradients,
            constants,
        })
    }
}

#[derive(Clone, Copy)]
struct Constants {
    config: AdamWConfig,
    scale: f32,
    rate: f32,
    second: f32,
    keep: f32,
}

struct Updater<'a> {
    path: Vec<String>,
    moments: &'a mut BTreeMap<String, Moments>,
    gradients: GradientSum,
    constants: Constants,
}

impl ModuleMapper for Updater<'_> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let path = self.path.join(".");
        let Some(gradient) = self.gradients.sums.remove(&path) else {
            return param;
        };
        let moments = self.moments.entry(path).or_insert_with(|| Moments {
            first: cadre_kernels::zeros(gradient.len()),
            second: cadre_kernels::zeros(gradient.len()),
        });
        let mut constants = self.constants;
        if D < 2 {
            constants.keep = 1.0;
        }
        let (id, tensor, mapper) = param.consume();
        let tensor = updated(tensor.inner(), |values| {
            update(values, &gradient, moments, constants);
        });
        Param::from_mapped_value(id, tensor.autodiff().require_grad(), mapper)
    }
}

/// `tensor` after `change`: in place where its memory is ours, else by way of a copy.
fn updated<const D: usize>(tensor: Tensor<D>, change: impl FnOnce(&mut [f32])) -> Tensor<D> {
    let device = tensor.device();
    if device == Device::flex() {
        let mut primitive = tensor
            .try_into_primitive::<Flex>()
            .expect("a tensor of the Flex device");
        change(primitive.storage_mut::<f32>());
        return Tensor::from_primitive::<Flex>(primitive);
    }
    let dims = tensor.dims();
    let mut values = crate::params::values(&tensor);
    change(&mut values);
    Tensor::from_data(TensorData::new(values, dims), &device)
}

fn update(values: &mut [f32], gradient: &[f32], moments: &mut Moments, c: Constants) {
    let AdamWConfig {
        beta1, beta2, eps, ..
    } = c.config;
    values
        .par_chunks_mut(CHUNK)
        .zip(gradient.par_chunks(CHUNK))
        .zip(moments.first.par_chunks_mut(CHUNK))
        .zip(moments.second.par_chunks_mut(CHUNK))
        .for_each(|(((values, gradient), first), second)| {
            crate::ops::vectorised(
                #[inline(always)]
                || {
                    let state = first.iter_mut().zip(second.iter_mut());
                    for ((x, g), (m, v)) in values.iter_mut().zip(gradient).zip(state) {
                        let g = g * c.scale;
                        *m = beta1 * *m + (1.0 - beta1) * g;
                        *v = beta2 * *v + (1.0 - beta2) * g * g;
                        *x = *x * c.keep - c.rate * *m / (v.sqrt() * c.second + eps);
                    }
                },
            );
        });
}
