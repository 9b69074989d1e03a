//! Instruction sets that have kernels here, and the only place that asks the CPU what it can do.

use std::fmt;
use std::str::FromStr;

/// An instruction set with its own kernels; within an architecture, worst first.
///
/// Other CPUs run [`Isa::Scalar`], which the compiler vectorises for the target's baseline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Portable Rust: the twin that the others are tested against.
    Scalar,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ, VL with VNNI (and everything in [`Isa::Avx2`]).
    Avx512,
    /// [`Isa::Avx512`] with products of bf16.
    Avx512Bf16,
    /// NEON, which every 64-bit ARM CPU has.
    Neon,
    /// [`Isa::Neon`] with dot products of 8-bit integers.
    NeonDotprod,
}

impl Isa {
    /// Every instruction set that Cadre knows, worst first.
    pub const ALL: [Isa; 6] = [
        Isa::Scalar,
        Isa::Avx2,
        Isa::Avx512,
        Isa::Avx512Bf16,
        Isa::Neon,
        Isa::NeonDotprod,
    ];

    /// The best one that this CPU has.
    pub fn detect() -> Isa {
        *Isa::ALL
            .iter()
            .rev()
            .find(|isa| isa.is_available())
            .unwrap_or(&Isa::Scalar)
    }

    /// Every one that this CPU has, worst first.
    pub fn available() -> Vec<Isa> {
        Isa::ALL
            .into_iter()
            .filter(|isa| isa.is_available())
            .collect()
    }

    /// Whether this CPU (and this build) can run it.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Scalar => true,
            Isa::Avx2 => cpu_has(&["avx2", "fma", "f16c"]),
            Isa::Avx512 => cpu_has(&[
                "avx2",
                "fma",
                "f16c",
                "avx512f",
                "avx512bw",
                "avx512dq",
                "avx512vl",
                "avx512vnni",
            ]),
            Isa::Avx512Bf16 => Isa::Avx512.is_available() && cpu_has(&["avx512bf16"]),
            Isa::Neon => cpu_has(&["neon"]),
            Isa::NeonDotprod => cpu_has(&["neon", "dotprod"]),
        }
    }

    /// Its name in flags and reports: `scalar`, `avx2`, `avx512`, `avx512_bf16`, `neon`, `neon_dotprod`.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Bf16 => "avx512_bf16",
            Isa::Neon => "neon",
            Isa::NeonDotprod => "neon_dotprod",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The error of parsing an [`Isa`] from text.
#[derive(Debug, thiserror::Error)]
#[error(
    "unknown instruction set \"{0}\"; known: scalar, avx2, avx512, avx512_bf16, neon, neon_dotprod"
)]
pub struct UnknownIsa(String);

impl FromStr for Isa {
    type Err = UnknownIsa;

    fn from_str(text: &str) -> Result<Self, UnknownIsa> {
        Isa::ALL
            .into_iter()
            .find(|isa| isa.name() == text)
            .ok_or_else(|| UnknownIsa(text.to_owned()))
    }
}

/// CPU features that matter to the kernels, each with whether this CPU has it. Empty on other architectures.
pub(crate) fn features() -> Vec<(&'static str, bool)> {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        vec![
            ("avx2", has!("avx2")),
            ("fma", has!("fma")),
            ("f16c", has!("f16c")),
            ("avx512f", has!("avx512f")),
            ("avx512bw", has!("avx512bw")),
            ("avx512dq", has!("avx512dq")),
            ("avx512vl", has!("avx512vl")),
            ("avx512vnni", has!("avx512vnni")),
            ("avx512bf16", has!("avx512bf16")),
        ]
    }
    #[cfg(target_arch = "aarch64")]
    {
        use std::arch::is_aarch64_feature_detected as has;
        vec![("neon", has!("neon")), ("dotprod", has!("dotprod"))]
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        Vec::new()
    }
}

fn cpu_has(needed: &[&str]) -> bool {
    let features = features();
    needed.iter().all(|name| {
        features
            .iter()
            .any(|(feature, has)| feature == name && *has)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_available_set_is_detected() {
        assert_eq!(Some(&Isa::detect()), Isa::available().last());
        assert!(Isa::Scalar.is_available());
    }

    #[test]
    fn names_parse_back_and_unknown_names_list_the_known() {
        for isa in Isa::ALL {
            assert_eq!(isa.name().parse::<Isa>().unwrap(), isa);
        }
        let error = "sve".parse::<Isa>().unwrap_err().to_string();
        assert!(error.contains("sve"), "{error}");
        for isa in Isa::ALL {
            assert!(error.contains(isa.name()), "{error}");
        }
    }
}
