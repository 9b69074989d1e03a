//! Knowledge distillation: a student follows a teacher's softened distribution.
//!
//! Paper: Distilling the Knowledge in a Neural Network, Hinton et al., 2015, arXiv 1503.02531; as the staged loss of
//! Mixture-of-Students in DeepSpeed-MoE, Rajbhandari et al., 2022, arXiv 2201.05596.
//! Differs from paper: the mean is over tokens, never over classes or sequences.

use burn::tensor::Tensor;
use burn::tensor::activation::log_softmax;

/// `mean_t temperature^2 KL(softmax(teacher / temperature) || softmax(student / temperature))` of logits `[T, V]`.
/// The teacher is a constant.
///
/// Derivative with respect to the student's logits:
/// `temperature / T (softmax(student / temperature) - softmax(teacher / temperature))`.
#[must_use]
pub fn distillation(student: Tensor<2>, teacher: Tensor<2>, temperature: f64) -> Tensor<1> {
    let log_s = log_softmax(student.div_scalar(temperature), 1);
    let log_t = log_softmax(teacher.detach().div_scalar(temperature), 1);
    let kl_t1 = (log_t.clone().exp() * (log_t - log_s)).sum_dim(1);
    kl_t1.mean().mul_scalar(temperature * temperature)
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    #[test]
    fn a_student_equal_to_its_teacher_costs_nothing() {
        let a = || Tensor::<2>::from_floats([[0.0, 1.0, -2.0]], &Device::flex());
        assert_eq!(distillation(a(), a(), 2.0).into_scalar::<f32>(), 0.0);
        // softmax(0, ln 3) = 1/4, 3/4 against 1/2, 1/2: KL = ln 2 - 1/2 ln(3/4 * 1/4 * 4) = 1/2 ln(4/3).
        let student = Tensor::from_floats([[0.0, 3f32.ln()]], &Device::flex());
        let teacher = Tensor::from_floats([[0.0, 0.0]], &Device::flex());
        let kl: f32 = distillation(student, teacher, 1.0).into_scalar();
        assert!((kl - 0.5 * (4f32 / 3.0).ln()).abs() < 1e-6);
        // Logits twice as large at twice the temperature are the same distributions, and count four times: MC-SMoE's
        // 0.2 KL at temperature 2 is a coefficient of 0.05.
        let student = Tensor::from_floats([[0.0, 2.0 * 3f32.ln()]], &Device::flex());
        let teacher = Tensor::from_floats([[0.0, 0.0]], &Device::flex());
        let softened: f32 = distillation(student, teacher, 2.0).into_scalar();
        assert!((0.05 * softened - 0.2 * kl).abs() < 1e-6);
    }
}
