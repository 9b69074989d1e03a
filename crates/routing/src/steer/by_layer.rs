//! What is said of some layers: maps from layers to experts, in JSON and in the short form of flags.
//!
//! In JSON a map's keys are layers: `{"3": [5, 7], "*": [12]}`, `{"0-11": {"5": 1.5}}`. As text, layers and experts are
//! separated by a colon and entries by `/`: `3:5,7/*:12` and `0-11:5=1.5`. Experts may be ranges, as in `3:0-7`.

use std::collections::BTreeSet;
use std::fmt;
use std::marker::PhantomData;
use std::str::FromStr;

use serde::de::{Error as _, MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::SteerError;

/// Which layers an entry is about. Layers are those of the model, dense ones counted, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Layers {
    /// Every layer that has experts: `*`.
    All,
    /// From the first to the last, both among them: `3` or `0-11`. Each must have experts.
    Range(usize, usize),
}

const EXPECTED_LAYERS: &str = "a layer such as `3`, layers such as `0-11`, or `*` for all";
const EXPECTED_EXPERTS: &str = "layers and experts such as `3:5,7`, `*:12` or `0-11:0-7`";
const EXPECTED_NUMBERS: &str = "layers, experts and numbers such as `3:5=1.5,7=-2` or `*:12=4`";
/// More entries than this are counted and not listed by `Display`.
const LISTED: usize = 12;

fn unreadable(text: &str, expected: &'static str) -> SteerError {
    SteerError::Unreadable {
        text: text.to_owned(),
        expected,
    }
}

/// `5` as 5 to 5, `0-7` as 0 to 7.
fn range<T: FromStr + Copy + PartialOrd>(text: &str) -> Option<(T, T)> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    // `parse` takes a sign, which would be another way to write the same.
    let number = |text: &str| match text.bytes().all(|byte| byte.is_ascii_digit()) {
        true => text.parse::<T>().ok(),
        false => None,
    };
    let (first, last) = (number(first.trim())?, number(last.trim())?);
    (first <= last).then_some((first, last))
}

impl FromStr for Layers {
    type Err = SteerError;

    fn from_str(text: &str) -> Result<Self, SteerError> {
        match text.trim() {
            "*" => Ok(Self::All),
            text => range(text)
                .map(|(first, last)| Self::Range(first, last))
                .ok_or_else(|| unreadable(text, EXPECTED_LAYERS)),
        }
    }
}

impl fmt::Display for Layers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("*"),
            Self::Range(first, last) if first == last => write!(f, "{first}"),
            Self::Range(first, last) => write!(f, "{first}-{last}"),
        }
    }
}

/// A map that keeps the order of its entries and refuses a key that comes twice.
#[derive(Clone, Debug, PartialEq)]
struct Entries<K, V>(Vec<(K, V)>);

impl<K: fmt::Display, V: Serialize> Serialize for Entries<K, V> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (key, value) in &self.0 {
            map.serialize_entry(&key.to_string(), value)?;
        }
        map.end()
    }
}

/// A key of JSON, which is a text whatever it stands for.
trait Key: Copy + Ord + fmt::Display {
    const WHAT: &'static str;

    fn read(text: &str) -> Option<Self>;
}

impl Key for Layers {
    const WHAT: &'static str = EXPECTED_LAYERS;

    fn read(text: &str) -> Option<Self> {
        text.parse().ok()
    }
}

impl Key for u16 {
    const WHAT: &'static str = "an expert such as `5`";

    fn read(text: &str) -> Option<Self> {
        let (first, last) = range(text)?;
        (first == last).then_some(first)
    }
}

impl<'de, K: Key, V: Deserialize<'de>> Deserialize<'de> for Entries<K, V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader<K, V>(PhantomData<(K, V)>);

        impl<'de, K: Key, V: Deserialize<'de>> Visitor<'de> for Reader<K, V> {
            type Value = Entries<K, V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a map from {}", K::WHAT)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries: Vec<(K, V)> = Vec::new();
                let mut known = BTreeSet::new();
                while let Some(text) = map.next_key::<String>()? {
                    let Some(key) = K::read(&text) else {
                        let message = format!("`{text}` is no key, expected {}", K::WHAT);
                        return Err(A::Error::custom(message));
                    };
                    if !known.insert(key) {
                        return Err(A::Error::custom(format!("`{key}` comes twice")));
                    }
                    entries.push((key, map.next_value()?));
                }
                Ok(Entries(entries))
            }
        }

        deserializer.deserialize_map(Reader(PhantomData))
    }
}

/// Experts of some layers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Experts(Entries<Layers, Vec<u16>>);

/// A number for some experts of some layers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Numbers(Entries<Layers, Entries<u16, f32>>);

impl Default for Experts {
    fn default() -> Self {
        Self(Entries(Vec::new()))
    }
}

impl Default for Numbers {
    fn default() -> Self {
        Self(Entries(Vec::new()))
    }
}

impl Experts {
    /// Whether nothing is said.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.0.iter().all(|(_, experts)| experts.is_empty())
    }

    /// Adds experts of some layers to what is said already.
    pub fn add(&mut self, layers: Layers, experts: impl IntoIterator<Item = u16>) {
        let at = self.0.0.iter().position(|(known, _)| *known == layers);
        let at = at.unwrap_or_else(|| {
            self.0.0.push((layers, Vec::new()));
            self.0.0.len() - 1
        });
        let known = &mut self.0.0[at].1;
        for expert in experts {
            if !known.contains(&expert) {
                known.push(expert);
            }
        }
    }

    /// Adds what `other` says.
    pub fn extend(&mut self, other: &Self) {
        for (layers, experts) in other.iter() {
            self.add(layers, experts.iter().copied());
        }
    }

    /// The entries, in the order in which they were given.
    pub fn iter(&self) -> impl Iterator<Item = (Layers, &[u16])> {
        let entries = self.0.0.iter();
        entries.map(|(layers, experts)| (*layers, experts.as_slice()))
    }
}

impl Numbers {
    /// Whether nothing is said.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.0.iter().all(|(_, numbers)| numbers.0.is_empty())
    }

    /// Adds a number for an expert of some layers. One that has a number already gets this one too, which is an error
    /// where the steering is used.
    pub fn add(&mut self, layers: Layers, expert: u16, number: f32) {
        let at = self.0.0.iter().position(|(known, _)| *known == layers);
        let at = at.unwrap_or_else(|| {
            self.0.0.push((layers, Entries(Vec::new())));
            self.0.0.len() - 1
        });
        self.0.0[at].1.0.push((expert, number));
    }

    /// Adds what `other` says.
    pub fn extend(&mut self, other: &Self) {
        for (layers, numbers) in other.iter() {
            for (expert, number) in numbers {
                self.add(layers, *expert, *number);
            }
        }
    }

    /// The same experts with what `change` makes of their numbers.
    #[must_use]
    pub fn map(&self, change: impl Fn(f32) -> f32) -> Self {
        let mut all = self.clone();
        for (_, numbers) in &mut all.0.0 {
            for (_, number) in &mut numbers.0 {
                *number = change(*number);
            }
        }
        all
    }

    /// The entries, in the order in which they were given.
    pub fn iter(&self) -> impl Iterator<Item = (Layers, &[(u16, f32)])> {
        let entries = self.0.0.iter();
        entries.map(|(layers, numbers)| (*layers, numbers.0.as_slice()))
    }
}

/// The parts of `3:5,7/*:12`, each cut at its colon.
fn parts<'a>(
    text: &'a str,
    expected: &'static str,
) -> impl Iterator<Item = Result<(Layers, &'a str), SteerError>> {
    text.split('/').map(move |part| {
        let (layers, rest) = part
            .split_once(':')
            .ok_or_else(|| unreadable(part, expected))?;
        Ok((layers.parse()?, rest))
    })
}

/// From `3:5,7/*:12`.
impl FromStr for Experts {
    type Err = SteerError;

    fn from_str(text: &str) -> Result<Self, SteerError> {
        let mut all = Self::default();
        for part in parts(text, EXPECTED_EXPERTS) {
            let (layers, experts) = part?;
            for word in experts.split(',') {
                let (first, last) =
                    range::<u16>(word.trim()).ok_or_else(|| unreadable(text, EXPECTED_EXPERTS))?;
                all.add(layers, first..=last);
            }
        }
        Ok(all)
    }
}

/// From `3:5=1.5,7=-2/*:12=4`.
impl FromStr for Numbers {
    type Err = SteerError;

    fn from_str(text: &str) -> Result<Self, SteerError> {
        let mut all = Self::default();
        let bad = || unreadable(text, EXPECTED_NUMBERS);
        for part in parts(text, EXPECTED_NUMBERS) {
            let (layers, numbers) = part?;
            for word in numbers.split(',') {
                let (experts, number) = word.split_once('=').ok_or_else(bad)?;
                let number: f32 = number.trim().parse().map_err(|_| bad())?;
                let (first, last) = range::<u16>(experts.trim()).ok_or_else(bad)?;
                for expert in first..=last {
                    all.add(layers, expert, number);
                }
            }
        }
        Ok(all)
    }
}

/// As it is read, or how many there are when they are many.
impl fmt::Display for Experts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n: usize = self.iter().map(|(_, experts)| experts.len()).sum();
        if n > LISTED {
            return write!(f, "{n}-experts");
        }
        for (at, (layers, experts)) in self.iter().enumerate() {
            let experts: Vec<String> = experts.iter().map(u16::to_string).collect();
            let slash = if at > 0 { "/" } else { "" };
            write!(f, "{slash}{layers}:{}", experts.join(","))?;
        }
        Ok(())
    }
}

/// As it is read, or how many there are when they are many.
impl fmt::Display for Numbers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n: usize = self.iter().map(|(_, numbers)| numbers.len()).sum();
        if n > LISTED {
            return write!(f, "{n}-experts");
        }
        for (at, (layers, numbers)) in self.iter().enumerate() {
            let numbers = numbers.iter().map(|(expert, n)| format!("{expert}={n}"));
            let slash = if at > 0 { "/" } else { "" };
            write!(
                f,
                "{slash}{layers}:{}",
                numbers.collect::<Vec<_>>().join(",")
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_and_json_say_the_same() {
        let experts: Experts = "3:5,7/*:12/0-2:0-1".parse().unwrap();
        let text = r#"{"3":[5,7],"*":[12],"0-2":[0,1]}"#;
        assert_eq!(serde_json::to_string(&experts).unwrap(), text);
        assert_eq!(serde_json::from_str::<Experts>(text).unwrap(), experts);
        assert_eq!(experts.to_string(), "3:5,7/*:12/0-2:0,1");
        assert_eq!("3:5/3:7,5/*:12/0-2:0,1".parse(), Ok(experts));

        let numbers: Numbers = "3:5=1.5,7=-2/*:12=4e0".parse().unwrap();
        let text = r#"{"3":{"5":1.5,"7":-2.0},"*":{"12":4.0}}"#;
        assert_eq!(serde_json::to_string(&numbers).unwrap(), text);
        assert_eq!(serde_json::from_str::<Numbers>(text).unwrap(), numbers);
        assert_eq!(numbers.to_string(), "3:5=1.5,7=-2/*:12=4");
    }

    #[test]
    fn many_are_counted() {
        let experts: Experts = "0:0-19".parse().unwrap();
        assert_eq!(experts.to_string(), "20-experts");
        let numbers: Numbers = "0:0-19=1".parse().unwrap();
        assert_eq!(numbers.to_string(), "20-experts");
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        for text in [
            "3", "3:", ":5", "x:5", "3:5;7", "3:7-5", "3:-1", "3:+1", "2-1:5", "3:70000", "",
        ] {
            let error = text.parse::<Experts>().unwrap_err().to_string();
            assert!(error.contains("expected"), "{text}: {error}");
        }
        for text in ["3:5", "3:5=", "3:5=x", "3:=1", "5=1"] {
            assert!(text.parse::<Numbers>().is_err(), "{text}");
        }
        let refused = |text: &str| {
            serde_json::from_str::<Experts>(text)
                .unwrap_err()
                .to_string()
        };
        assert!(refused(r#"{"3":[5],"3":[7]}"#).contains("`3` comes twice"));
        assert!(refused(r#"{"three":[5]}"#).contains("`three` is no key"));
        assert!(refused(r#"{"3":[-5]}"#).contains("-5"));
        assert!(refused(r#"[5]"#).contains("a map from a layer"));
        let refused = |text: &str| {
            serde_json::from_str::<Numbers>(text)
                .unwrap_err()
                .to_string()
        };
        assert!(refused(r#"{"3":{"5":1,"5":2}}"#).contains("`5` comes twice"));
        assert!(refused(r#"{"3":[5]}"#).contains("a map from an expert"));
    }
}
