//! Where a run's tensors live: the CPU with the fused operations, or a device of a backend that the build was given.

#[cfg(any(test, feature = "vulkan", feature = "cuda", feature = "metal"))]
mod trial;

use crate::error::{Result, TrainError};
use crate::ops::{Precision, Recompute};
use crate::recipe::Train;
use burn::tensor::{Device, Tensor};
use cadre_routing::RoutingError;
use serde::{Deserialize, Serialize};

/// `train.device` of a recipe.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// The processor.
    #[default]
    Cpu,
    /// A graphics card of any vendor through Vulkan (Cargo feature `vulkan`).
    Vulkan,
    /// A Vulkan driver that computes on the processor (Mesa's llvmpipe, SwiftShader), slowly: to try what a card would do
    /// where there is none. Needs the same feature.
    VulkanSoftware,
    /// An NVIDIA card (Cargo feature `cuda`).
    Cuda,
    /// An Apple GPU (Cargo feature `metal`).
    Metal,
}

impl Place {
    /// As recipes write it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Vulkan => "vulkan",
            Self::VulkanSoftware => "vulkan-software",
            Self::Cuda => "cuda",
            Self::Metal => "metal",
        }
    }

    /// The Cargo feature that a build needs for it.
    fn feature(self) -> &'static str {
        match self {
            Self::VulkanSoftware => Self::Vulkan.name(),
            other => other.name(),
        }
    }

    /// Whether this is the processor; recipes leave it out then.
    #[must_use]
    pub fn is_cpu(&self) -> bool {
        *self == Self::Cpu
    }

    /// The first device of this kind, after a small model has come out on it as on the processor.
    ///
    /// # Errors
    /// A build without the backend, a machine without such a device, or one that computes something else.
    pub fn open(self) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::flex()),
            #[cfg(feature = "vulkan")]
            Self::Vulkan | Self::VulkanSoftware => self.tried(self.vulkan()?),
            #[cfg(feature = "cuda")]
            Self::Cuda => self.tried(self.first(burn::tensor::DeviceType::Cuda)?),
            #[cfg(feature = "metal")]
            Self::Metal => self.tried(self.first(burn::tensor::DeviceType::Metal)?),
            #[allow(
                unreachable_patterns,
                reason = "nothing is left when every feature is on"
            )]
            other => Err(TrainError::Device {
                device: other.name(),
                problem: format!(
                    "this build has no such backend; build with `--features {}`",
                    other.feature()
                ),
            }),
        }
    }

    /// A card, the fastest kind first; or what only pretends to be one.
    #[cfg(feature = "vulkan")]
    fn vulkan(self) -> Result<Device> {
        use burn::tensor::{DeviceKind, DeviceType};
        let found = Device::enumerate(DeviceType::Vulkan).into_vec();
        let software = Device::vulkan(DeviceKind::Cpu);
        if self == Self::VulkanSoftware {
            return match found.contains(&software) {
                true => Ok(software),
                false => Err(self.no("this machine has no Vulkan driver that computes on the processor; install Mesa's (`mesa-vulkan-drivers`)")),
            };
        }
        let kinds = [
            DeviceKind::DiscreteGpu(0),
            DeviceKind::IntegratedGpu(0),
            DeviceKind::VirtualGpu(0),
        ];
        let best = kinds
            .into_iter()
            .map(Device::vulkan)
            .find(|card| found.contains(card));
        let other = || found.iter().find(|device| **device != software).cloned();
        best.or_else(other).ok_or_else(|| {
            self.no(match found.is_empty() {
                true => "this machine has no such device, or no driver for it",
                false => {
                    "the only Vulkan device computes on the processor, which \"cpu\" does far faster; to try it all the \
                     same, \"vulkan-software\""
                }
            })
        })
    }

    #[cfg(any(feature = "cuda", feature = "metal"))]
    fn first(self, kind: burn::tensor::DeviceType) -> Result<Device> {
        let found = Device::enumerate(kind).into_vec();
        let first = found.into_iter().next();
        first.ok_or_else(|| self.no("this machine has no such device, or no driver for it"))
    }

    /// `device`, if it computes what the processor does.
    #[cfg(any(feature = "vulkan", feature = "cuda", feature = "metal"))]
    fn tried(self, device: Device) -> Result<Device> {
        match trial::run(&device) {
            Ok(()) => Ok(device),
            Err(problem) => Err(self.no(&problem)),
        }
    }

    #[cfg(any(feature = "vulkan", feature = "cuda", feature = "metal"))]
    fn no(self, problem: &str) -> TrainError {
        TrainError::Device {
            device: self.name(),
            problem: problem.to_owned(),
        }
    }
}

/// The values of `tensor`, in order.
///
/// # Errors
/// A device that did not compute them: its memory is full, or its driver failed. Work on a device is done when somebody
/// reads, so this is where it shows.
pub(crate) fn read<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>, RoutingError> {
    let values = tensor.try_into_vec_as::<f32>();
    values.map_err(|error| RoutingError::Device {
        problem: cause(&error.to_string()),
    })
}

/// The last of the causes in a device's report, which has one after another over many lines.
fn cause(report: &str) -> String {
    let last = report.rsplit("Caused by:").next().unwrap_or(report);
    let line = last.lines().map(str::trim).find(|line| !line.is_empty());
    line.unwrap_or("it does not say why").to_owned()
}

impl Train {
    /// Refuses what only the fused operations of the CPU have.
    pub(crate) fn check_device(&self) -> Result<(), String> {
        let device = self.device.name();
        if self.device.is_cpu() {
            Ok(())
        } else if self.precision != Precision::F32 {
            Err(format!(
                "`train.precision` = \"{}\" is for `train.device` = \"cpu\"; \"{device}\" multiplies f32",
                self.precision.name()
            ))
        } else if self.recompute == Recompute::Experts {
            Err(format!(
                "`train.recompute` = \"experts\" is for `train.device` = \"cpu\"; with \"{device}\", \"none\" or \"layer\""
            ))
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_is_always_there() {
        assert!(Place::Cpu.open().unwrap() == Device::flex());
    }

    #[cfg(not(any(feature = "vulkan", feature = "cuda", feature = "metal")))]
    #[test]
    fn a_backend_that_is_not_built_is_named_with_its_feature() {
        for (place, feature) in [
            (Place::Vulkan, "vulkan`"),
            (Place::VulkanSoftware, "vulkan`"),
            (Place::Cuda, "cuda`"),
            (Place::Metal, "metal`"),
        ] {
            let error = place.open().unwrap_err().to_string();
            assert!(error.contains(place.name()), "{error}");
            assert!(error.contains(&format!("--features {feature}")), "{error}");
        }
    }

    #[test]
    fn of_a_report_the_last_cause_is_told() {
        let report = "Execution(An error happened\nCaused by:\n  Several failures at once\nCaused by:\n  skipped `Kernel`\n\
                      Caused by:\n  An IO error happened\nCaused by:\n  can't allocate buffer of size: 262144000\nNo backtrace";
        assert_eq!(cause(report), "can't allocate buffer of size: 262144000");
        assert_eq!(cause("device lost"), "device lost");
        assert_eq!(cause(""), "it does not say why");
    }
}
