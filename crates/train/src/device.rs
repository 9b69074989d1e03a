//! Where a run's tensors live: the CPU with the fused operations, or a device of a backend that the build was given.

use crate::error::{Result, TrainError};
use crate::ops::{Precision, Recompute};
use crate::recipe::Train;
use burn::tensor::Device;
use serde::{Deserialize, Serialize};

/// `train.device` of a recipe.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    /// The processor.
    #[default]
    Cpu,
    /// A graphics card of any vendor through Vulkan (Cargo feature `vulkan`).
    Vulkan,
    /// An NVIDIA card (Cargo feature `cuda`).
    Cuda,
    /// An Apple GPU (Cargo feature `metal`).
    Metal,
}

impl Place {
    /// As recipes write it; for devices other than the CPU also the name of the Cargo feature.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Vulkan => "vulkan",
            Self::Cuda => "cuda",
            Self::Metal => "metal",
        }
    }

    /// Whether this is the processor; recipes leave it out then.
    #[must_use]
    pub fn is_cpu(&self) -> bool {
        *self == Self::Cpu
    }

    /// The first device of this kind.
    ///
    /// # Errors
    /// A build without the backend, or a machine without such a device.
    pub fn open(self) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::flex()),
            #[cfg(feature = "vulkan")]
            Self::Vulkan => self.first(burn::tensor::DeviceType::Vulkan),
            #[cfg(feature = "cuda")]
            Self::Cuda => self.first(burn::tensor::DeviceType::Cuda),
            #[cfg(feature = "metal")]
            Self::Metal => self.first(burn::tensor::DeviceType::Metal),
            #[allow(
                unreachable_patterns,
                reason = "nothing is left when every feature is on"
            )]
            other => Err(TrainError::Device {
                device: other.name(),
                problem: format!(
                    "this build has no such backend; build with `--features {}`",
                    other.name()
                ),
            }),
        }
    }

    #[cfg(any(feature = "vulkan", feature = "cuda", feature = "metal"))]
    fn first(self, kind: burn::tensor::DeviceType) -> Result<Device> {
        let found = Device::enumerate(kind);
        found.first().cloned().ok_or_else(|| TrainError::Device {
            device: self.name(),
            problem: "this machine has no such device, or no driver for it".to_owned(),
        })
    }
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
        for place in [Place::Vulkan, Place::Cuda, Place::Metal] {
            let error = place.open().unwrap_err().to_string();
            assert!(
                error.contains(&format!("--features {}", place.name())),
                "{error}"
            );
        }
    }
}
