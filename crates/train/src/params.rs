//! Parameters by path: copying them out of a model and back in.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Tensor, TensorData};
use std::collections::BTreeMap;

/// Shape and values of one tensor.
pub type Values = (Vec<usize>, Vec<f32>);

/// Values of a float tensor.
///
/// # Panics
/// If the tensor is not f32; training tensors are.
#[must_use]
pub fn values<const D: usize>(tensor: &Tensor<D>) -> Vec<f32> {
    tensor
        .to_data()
        .try_to_vec::<f32>()
        .expect("training tensors are f32")
}

/// Gives a parameter other values.
///
/// # Panics
/// If they are not as many as it has.
pub(crate) fn set_values<const D: usize>(param: &mut Param<Tensor<D>>, values: Vec<f32>) {
    let old = param.val();
    let new = Tensor::from_data(TensorData::new(values, old.dims()), &old.device());
    *param = Param::initialized(param.id, new.require_grad());
}

/// All parameters by path, in path order.
#[must_use]
pub fn collect<M: Module>(model: &M) -> BTreeMap<String, Values> {
    let mut visitor = Visitor::default();
    model.visit(&mut visitor);
    visitor.found
}

#[derive(Default)]
struct Visitor {
    path: Vec<String>,
    found: BTreeMap<String, Values>,
}

impl ModuleVisitor for Visitor {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let tensor = param.val();
        let shape = tensor.dims().to_vec();
        self.found
            .insert(self.path.join("."), (shape, values(&tensor)));
    }
}

/// Replaces every parameter; `take` gives the new values of a path with a shape.
///
/// # Errors
/// The first error of `take`; the model is lost then.
pub fn replace<M: Module, E>(
    model: M,
    take: impl FnMut(&str, &[usize]) -> Result<Vec<f32>, E>,
) -> Result<M, E> {
    let mut mapper = Mapper {
        path: Vec::new(),
        take,
        error: None,
    };
    let model = model.map(&mut mapper);
    mapper.error.map_or(Ok(model), Err)
}

struct Mapper<F, E> {
    path: Vec<String>,
    take: F,
    error: Option<E>,
}

impl<E, F: FnMut(&str, &[usize]) -> Result<Vec<f32>, E>> ModuleMapper for Mapper<F, E> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if self.error.is_some() {
            return param;
        }
        let shape = param.val().dims();
        match (self.take)(&self.path.join("."), &shape) {
            Ok(values) => param.map(|old| {
                let new = Tensor::from_data(TensorData::new(values, shape), &old.device());
                new.require_grad()
            }),
            Err(error) => {
                self.error = Some(error);
                param
            }
        }
    }
}
