//! Colours: conversion from OKLCH, the heat ramps for loads, and one distinguishable colour per expert or domain.
//!
//! Everything is chosen in OKLCH (lightness, chroma, hue in degrees), where equal steps look equal, so neighbouring
//! experts can be kept apart and all text colours keep about the same contrast.

/// An sRGB colour, 8 bits per channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rgb(pub(crate) u8, pub(crate) u8, pub(crate) u8);

impl Rgb {
    /// `#rrggbb`.
    pub(crate) fn hex(self) -> String {
        format!("#{:02x}{:02x}{:02x}", self.0, self.1, self.2)
    }
}

/// Background the colours are meant for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ground {
    Light,
    Dark,
}

/// Heat ramps as OKLCH stops at 0, 1/4, 1/2, 3/4, 1. Both start near their background and get stronger.
const RAMP_DARK: [(f64, f64, f64); 5] = [
    (0.23, 0.02, 285.0),
    (0.34, 0.10, 292.0),
    (0.50, 0.20, 335.0),
    (0.71, 0.19, 42.0),
    (0.95, 0.14, 98.0),
];
const RAMP_LIGHT: [(f64, f64, f64); 5] = [
    (0.965, 0.006, 285.0),
    (0.92, 0.06, 88.0),
    (0.79, 0.15, 60.0),
    (0.58, 0.21, 18.0),
    (0.33, 0.14, 315.0),
];

/// Colour of an intensity from 0 to 1.
pub(crate) fn heat(intensity: f64, ground: Ground) -> Rgb {
    let ramp = match ground {
        Ground::Light => &RAMP_LIGHT,
        Ground::Dark => &RAMP_DARK,
    };
    let at = intensity.clamp(0.0, 1.0) * (ramp.len() - 1) as f64;
    let first = (at.floor() as usize).min(ramp.len() - 2);
    let (from, to) = (oklab(ramp[first]), oklab(ramp[first + 1]));
    let mix = |a: f64, b: f64| a + (b - a) * (at - first as f64);
    from_oklab((mix(from.0, to.0), mix(from.1, to.1), mix(from.2, to.2)))
}

/// Intensity of a share relative to an even share: 0 for nothing, 1 for four times an even share and above.
pub(crate) fn intensity(relative_share: f64) -> f64 {
    // A power below 1 keeps rare experts visible and an even share calm.
    (relative_share.max(0.0) / 4.0).powf(0.75).min(1.0)
}

/// One colour per expert, readable as text on light and on dark. Neighbouring ids get distant hues; neighbouring
/// hues differ in lightness.
pub(crate) fn expert_colours(n_experts: usize) -> Vec<Rgb> {
    let lightness = [0.66, 0.74, 0.58];
    let colour = |e: usize| {
        let rank = hue_rank(e, n_experts);
        oklch(
            lightness[rank % 3],
            0.17,
            25.0 + 360.0 * rank as f64 / n_experts as f64,
        )
    };
    (0..n_experts).map(colour).collect()
}

/// One colour per expert from the 6x6x6 cube of the xterm palette, as palette indices. Distinct up to the number of
/// cube colours that are neither too dark, too light nor too grey; after that they repeat.
pub(crate) fn expert_xterm(n_experts: usize) -> Vec<u8> {
    let mut usable: Vec<(f64, u8)> = Vec::new();
    for index in 16..232_u8 {
        let (l, a, b) = to_oklab(xterm_rgb(index));
        if (0.5..0.86).contains(&l) && a.hypot(b) > 0.07 {
            usable.push((b.atan2(a), index));
        }
    }
    usable.sort_by(|x, y| x.0.total_cmp(&y.0));
    let n = usable.len();
    let colour = |e: usize| {
        let rank = hue_rank(e, n_experts);
        usable[if n_experts <= n {
            rank * n / n_experts
        } else {
            rank % n
        }]
        .1
    };
    (0..n_experts).map(colour).collect()
}

/// One colour per domain, readable on the ground.
pub(crate) fn domain_colours(n_domains: usize, ground: Ground) -> Vec<Rgb> {
    let (lightness, chroma) = match ground {
        Ground::Light => (0.60, 0.16),
        Ground::Dark => (0.74, 0.14),
    };
    let hue =
        |d: usize| 255.0 + 360.0 * hue_rank(d, n_domains.max(5)) as f64 / n_domains.max(5) as f64;
    (0..n_domains)
        .map(|d| oklch(lightness, chroma, hue(d)))
        .collect()
}

/// A permutation of `0..n` that sends neighbours far apart: multiples of a stride near the golden section.
fn hue_rank(index: usize, n: usize) -> usize {
    let wanted = ((n as f64 * 0.382).round() as usize).max(1);
    let coprime = |stride: &usize| gcd(*stride, n) == 1;
    let stride = (wanted..n).find(coprime).unwrap_or(1);
    index * stride % n.max(1)
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The sRGB value of an index of the xterm colour cube.
fn xterm_rgb(index: u8) -> Rgb {
    let level = |step: u8| if step == 0 { 0 } else { 55 + 40 * step };
    let cube = index - 16;
    Rgb(level(cube / 36), level(cube / 6 % 6), level(cube % 6))
}

/// OKLCH to sRGB; chroma is reduced until the colour exists.
fn oklch(lightness: f64, chroma: f64, hue: f64) -> Rgb {
    from_oklab(oklab((lightness, chroma, hue)))
}

fn oklab((lightness, chroma, hue): (f64, f64, f64)) -> (f64, f64, f64) {
    let angle = hue.to_radians();
    (lightness, chroma * angle.cos(), chroma * angle.sin())
}

/// OKLab to sRGB, pulled towards grey until every channel is in range.
fn from_oklab((lightness, a, b): (f64, f64, f64)) -> Rgb {
    let mut scale = 1.0;
    loop {
        let linear = to_linear((lightness, a * scale, b * scale));
        let fits = linear
            .iter()
            .all(|channel| (-1e-4..=1.0001).contains(channel));
        if fits || scale < 0.01 {
            let [r, g, b] = linear.map(encode);
            return Rgb(r, g, b);
        }
        scale -= 0.02;
    }
}

fn to_linear((lightness, a, b): (f64, f64, f64)) -> [f64; 3] {
    let l = (lightness + 0.396_337_777_4 * a + 0.215_803_757_3 * b).powi(3);
    let m = (lightness - 0.105_561_345_8 * a - 0.063_854_172_8 * b).powi(3);
    let s = (lightness - 0.089_484_177_5 * a - 1.291_485_548_0 * b).powi(3);
    [
        4.076_741_662_1 * l - 3.307_711_591_3 * m + 0.230_969_929_2 * s,
        -1.268_438_004_6 * l + 2.609_757_401_1 * m - 0.341_319_396_5 * s,
        -0.004_196_086_3 * l - 0.703_418_614_7 * m + 1.707_614_701_0 * s,
    ]
}

fn to_oklab(colour: Rgb) -> (f64, f64, f64) {
    let [r, g, b] = [colour.0, colour.1, colour.2].map(decode);
    let l = (0.412_221_470_8 * r + 0.536_332_536_3 * g + 0.051_445_992_9 * b).cbrt();
    let m = (0.211_903_498_2 * r + 0.680_699_545_1 * g + 0.107_396_956_6 * b).cbrt();
    let s = (0.088_302_461_9 * r + 0.281_718_837_6 * g + 0.629_978_700_5 * b).cbrt();
    (
        0.210_454_255_3 * l + 0.793_617_785_0 * m - 0.004_072_046_8 * s,
        1.977_998_495_1 * l - 2.428_592_205_0 * m + 0.450_593_709_9 * s,
        0.025_904_037_1 * l + 0.782_771_766_2 * m - 0.808_675_766_0 * s,
    )
}

fn encode(linear: f64) -> u8 {
    let linear = linear.clamp(0.0, 1.0);
    let srgb = if linear <= 0.003_130_8 {
        12.92 * linear
    } else {
        1.055 * linear.powf(1.0 / 2.4) - 0.055
    };
    (srgb * 255.0).round() as u8
}

fn decode(channel: u8) -> f64 {
    let srgb = f64::from(channel) / 255.0;
    if srgb <= 0.040_45 {
        srgb / 12.92
    } else {
        ((srgb + 0.055) / 1.055).powf(2.4)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn distance(a: Rgb, b: Rgb) -> f64 {
        let (a, b) = (to_oklab(a), to_oklab(b));
        ((a.0 - b.0).powi(2) + (a.1 - b.1).powi(2) + (a.2 - b.2).powi(2)).sqrt()
    }

    #[test]
    fn known_colours_convert_both_ways() {
        assert_eq!(oklch(1.0, 0.0, 0.0), Rgb(255, 255, 255));
        assert_eq!(oklch(0.0, 0.0, 0.0), Rgb(0, 0, 0));
        // Red in OKLCH.
        let red = oklch(0.628, 0.257_7, 29.23);
        assert!(distance(red, Rgb(255, 0, 0)) < 0.01, "{red:?}");
    }

    #[test]
    fn the_heat_ramps_move_away_from_their_ground() {
        for (ground, sign) in [(Ground::Dark, 1.0), (Ground::Light, -1.0)] {
            let lightness: Vec<f64> = (0..=20)
                .map(|i| to_oklab(heat(f64::from(i) / 20.0, ground)).0 * sign)
                .collect();
            assert!(lightness.is_sorted(), "{ground:?}: {lightness:?}");
        }
        assert_eq!(heat(7.0, Ground::Dark), heat(1.0, Ground::Dark));
        assert_eq!(
            (intensity(0.0), intensity(4.0), intensity(99.0)),
            (0.0, 1.0, 1.0)
        );
    }

    #[test]
    fn experts_can_be_told_apart() {
        for (n_experts, apart) in [(8, 0.1), (16, 0.06), (32, 0.03), (128, 0.005)] {
            let colours = expert_colours(n_experts);
            for (i, &a) in colours.iter().enumerate() {
                for &b in &colours[..i] {
                    assert!(distance(a, b) > apart, "{n_experts}: {a:?} and {b:?}");
                }
            }
            // Neighbouring ids are clearly different.
            assert!(
                colours
                    .windows(2)
                    .all(|pair| distance(pair[0], pair[1]) > 0.1)
            );
        }
    }

    #[test]
    fn terminal_colours_are_distinct_while_they_last() {
        for n_experts in [1, 2, 16, 64] {
            let distinct: HashSet<u8> = expert_xterm(n_experts).into_iter().collect();
            assert_eq!(distinct.len(), n_experts);
        }
        assert_eq!(expert_xterm(512).len(), 512);
    }

    #[test]
    fn any_number_of_experts_and_domains_has_colours() {
        for n in 0..=130 {
            assert_eq!(expert_colours(n).len(), n);
            assert_eq!(domain_colours(n, Ground::Dark).len(), n);
        }
        assert_eq!(Rgb(1, 2, 255).hex(), "#0102ff");
    }
}
