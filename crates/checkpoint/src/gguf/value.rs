//! Metadata values of a GGUF file: their thirteen types, and arrays that stay encoded until they are asked for.

use bytes::Bytes;

use super::cursor::{Cursor, Problem, utf8};

/// Longest text value. The largest known, a whole `tokenizer.json`, are some tens of MB.
const MAX_TEXT: usize = 256 << 20;

/// Arrays within arrays are walked this deep; no known writer makes any.
pub(super) const MAX_DEPTH: usize = 4;

/// Type of a [`Value`]; the discriminants are the ids in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
#[expect(missing_docs, reason = "the names say it all")]
pub enum ValueType {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    Text = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

const TYPES: &[(ValueType, &str, Option<usize>)] = &[
    (ValueType::U8, "u8", Some(1)),
    (ValueType::I8, "i8", Some(1)),
    (ValueType::U16, "u16", Some(2)),
    (ValueType::I16, "i16", Some(2)),
    (ValueType::U32, "u32", Some(4)),
    (ValueType::I32, "i32", Some(4)),
    (ValueType::F32, "f32", Some(4)),
    (ValueType::Bool, "bool", Some(1)),
    (ValueType::Text, "text", None),
    (ValueType::Array, "array", None),
    (ValueType::U64, "u64", Some(8)),
    (ValueType::I64, "i64", Some(8)),
    (ValueType::F64, "f64", Some(8)),
];

impl ValueType {
    pub(super) fn from_id(id: u32) -> Result<Self, Problem> {
        let row = TYPES.get(id as usize);
        row.map(|row| row.0)
            .ok_or_else(|| format!("has value type {id}; known are 0 to {}", TYPES.len() - 1))
    }

    /// Short name: `u32`, `text`, `array`.
    #[must_use]
    pub fn name(self) -> &'static str {
        TYPES[self as usize].1
    }

    /// Encoded bytes of one value, if all have the same.
    pub(super) fn fixed_bytes(self) -> Option<usize> {
        TYPES[self as usize].2
    }

    /// Fewest bytes that one value can take.
    fn min_bytes(self) -> usize {
        match self {
            Self::Text => 8,
            Self::Array => 12,
            _ => self.fixed_bytes().unwrap_or(1),
        }
    }
}

/// One metadata value.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "the names say it all")]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    Text(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// An array of values of one type, encoded as in the file: opening a file with a vocabulary of 150 000 words costs one
/// pass over it and no allocation.
#[derive(Clone, PartialEq)]
pub struct Array {
    item: ValueType,
    len: usize,
    bytes: Bytes,
}

impl Value {
    /// Its type.
    #[must_use]
    pub fn kind(&self) -> ValueType {
        match self {
            Self::U8(_) => ValueType::U8,
            Self::I8(_) => ValueType::I8,
            Self::U16(_) => ValueType::U16,
            Self::I16(_) => ValueType::I16,
            Self::U32(_) => ValueType::U32,
            Self::I32(_) => ValueType::I32,
            Self::F32(_) => ValueType::F32,
            Self::Bool(_) => ValueType::Bool,
            Self::Text(_) => ValueType::Text,
            Self::Array(_) => ValueType::Array,
            Self::U64(_) => ValueType::U64,
            Self::I64(_) => ValueType::I64,
            Self::F64(_) => ValueType::F64,
        }
    }

    /// The value as an integer, whatever its integer type.
    #[must_use]
    pub fn as_integer(&self) -> Option<i128> {
        match *self {
            Self::U8(v) => Some(v.into()),
            Self::I8(v) => Some(v.into()),
            Self::U16(v) => Some(v.into()),
            Self::I16(v) => Some(v.into()),
            Self::U32(v) => Some(v.into()),
            Self::I32(v) => Some(v.into()),
            Self::U64(v) => Some(v.into()),
            Self::I64(v) => Some(v.into()),
            _ => None,
        }
    }

    /// The value as a real number: floats of both widths and integers.
    #[must_use]
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::F32(v) => Some(v.into()),
            Self::F64(v) => Some(v),
            _ => self.as_integer().map(|v| v as f64),
        }
    }

    /// The value as a flag.
    #[must_use]
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Self::Bool(v) => Some(*v),
            _ => None,
        }
    }

    /// Reads a type id and a value of it. `whole` are the bytes `cursor` runs over, for arrays to share.
    pub(super) fn read(cursor: &mut Cursor<'_>, whole: &Bytes) -> Result<Self, Problem> {
        let kind = ValueType::from_id(cursor.u32()?)?;
        Self::read_item(kind, cursor, whole)
    }

    fn read_item(kind: ValueType, cursor: &mut Cursor<'_>, whole: &Bytes) -> Result<Self, Problem> {
        Ok(match kind {
            ValueType::U8 => Self::U8(u8::from_le_bytes(cursor.word()?)),
            ValueType::I8 => Self::I8(i8::from_le_bytes(cursor.word()?)),
            ValueType::U16 => Self::U16(u16::from_le_bytes(cursor.word()?)),
            ValueType::I16 => Self::I16(i16::from_le_bytes(cursor.word()?)),
            ValueType::U32 => Self::U32(cursor.u32()?),
            ValueType::I32 => Self::I32(i32::from_le_bytes(cursor.word()?)),
            ValueType::F32 => Self::F32(f32::from_le_bytes(cursor.word()?)),
            ValueType::Bool => Self::Bool(read_bool(cursor)?),
            ValueType::Text => Self::Text(utf8(cursor.string(MAX_TEXT)?)?.to_owned()),
            ValueType::Array => Self::Array(Array::read(cursor, whole)?),
            ValueType::U64 => Self::U64(cursor.u64()?),
            ValueType::I64 => Self::I64(i64::from_le_bytes(cursor.word()?)),
            ValueType::F64 => Self::F64(f64::from_le_bytes(cursor.word()?)),
        })
    }

    /// Appends the type id and the value, as in a file.
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        out.extend((self.kind() as u32).to_le_bytes());
        match self {
            Self::U8(v) => out.extend(v.to_le_bytes()),
            Self::I8(v) => out.extend(v.to_le_bytes()),
            Self::U16(v) => out.extend(v.to_le_bytes()),
            Self::I16(v) => out.extend(v.to_le_bytes()),
            Self::U32(v) => out.extend(v.to_le_bytes()),
            Self::I32(v) => out.extend(v.to_le_bytes()),
            Self::F32(v) => out.extend(v.to_le_bytes()),
            Self::Bool(v) => out.push(u8::from(*v)),
            Self::Text(v) => write_text(v, out),
            Self::Array(v) => {
                out.extend((v.item as u32).to_le_bytes());
                out.extend((v.len as u64).to_le_bytes());
                out.extend_from_slice(&v.bytes);
            }
            Self::U64(v) => out.extend(v.to_le_bytes()),
            Self::I64(v) => out.extend(v.to_le_bytes()),
            Self::F64(v) => out.extend(v.to_le_bytes()),
        }
    }
}

fn read_bool(cursor: &mut Cursor<'_>) -> Result<bool, Problem> {
    match cursor.word::<1>()? {
        [0] => Ok(false),
        [1] => Ok(true),
        [other] => Err(format!("holds {other} where a bool must be 0 or 1")),
    }
}

/// Appends the length and the bytes of `text`.
pub(super) fn write_text(text: &str, out: &mut Vec<u8>) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

impl Array {
    /// Reads item type and length, and passes over the items.
    fn read(cursor: &mut Cursor<'_>, whole: &Bytes) -> Result<Self, Problem> {
        let item = ValueType::from_id(cursor.u32()?)?;
        let len = cursor.count(item.min_bytes(), "array items")?;
        let from = cursor.at();
        skip(item, len, cursor, 1)?;
        Ok(Self {
            item,
            len: usize::try_from(len).map_err(|error| error.to_string())?,
            bytes: whole.slice(from..cursor.at()),
        })
    }

    /// An array of texts.
    pub fn of_texts<T: AsRef<str>>(texts: impl IntoIterator<Item = T>) -> Self {
        let (mut len, mut bytes) = (0, Vec::new());
        for text in texts {
            write_text(text.as_ref(), &mut bytes);
            len += 1;
        }
        Self {
            item: ValueType::Text,
            len,
            bytes: bytes.into(),
        }
    }

    /// Type of its items.
    #[must_use]
    pub fn item_type(&self) -> ValueType {
        self.item
    }

    /// Number of items.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no items.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first `n` items, if there are so many and all have the same number of bytes.
    pub(crate) fn first(&self, n: usize) -> Option<Self> {
        let size = self.item.fixed_bytes()?;
        (n <= self.len).then(|| Self {
            item: self.item,
            len: n,
            bytes: self.bytes.slice(..n * size),
        })
    }

    /// The items, decoded one by one. An item that cannot be decoded (text that is not UTF-8, a bool that is neither
    /// 0 nor 1) is an error in words.
    pub fn iter(&self) -> impl Iterator<Item = Result<Value, String>> + '_ {
        let mut cursor = Cursor::new(&self.bytes);
        let item = move |at| {
            let value = Value::read_item(self.item, &mut cursor, &self.bytes);
            value.map_err(|problem| format!("item {at} {problem}"))
        };
        (0..self.len).map(item)
    }

    /// The items of an array of texts, not copied; `Err` says what is wrong.
    pub(super) fn texts(&self) -> Result<Vec<&str>, Problem> {
        if self.item != ValueType::Text {
            return Err(format!(
                "is an array of {}, expected text",
                self.item.name()
            ));
        }
        let mut cursor = Cursor::new(&self.bytes);
        let mut texts = Vec::with_capacity(self.len);
        for at in 0..self.len {
            let text = cursor.string(MAX_TEXT).and_then(utf8);
            texts.push(text.map_err(|problem| format!("item {at} {problem}"))?);
        }
        Ok(texts)
    }
}

impl std::fmt::Debug for Array {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[{}; {}]", self.item.name(), self.len)
    }
}

/// Passes over `len` items.
fn skip(item: ValueType, len: u64, cursor: &mut Cursor<'_>, depth: usize) -> Result<(), Problem> {
    if let Some(size) = item.fixed_bytes() {
        cursor.take(len.saturating_mul(size as u64))?;
        return Ok(());
    }
    if depth > MAX_DEPTH {
        return Err(format!(
            "has arrays within arrays more than {MAX_DEPTH} deep"
        ));
    }
    for _ in 0..len {
        if item == ValueType::Text {
            cursor.string(MAX_TEXT)?;
        } else {
            let inner = ValueType::from_id(cursor.u32()?)?;
            let len = cursor.count(inner.min_bytes(), "array items")?;
            skip(inner, len, cursor, depth + 1)?;
        }
    }
    Ok(())
}

macro_rules! from_numbers {
    ($($number:ty => $kind:ident),*) => {$(
        impl From<&[$number]> for Array {
            fn from(items: &[$number]) -> Self {
                let bytes: Vec<u8> = items.iter().flat_map(|item| item.to_le_bytes()).collect();
                Self { item: ValueType::$kind, len: items.len(), bytes: bytes.into() }
            }
        }
        impl From<$number> for Value {
            fn from(value: $number) -> Self {
                Self::$kind(value)
            }
        }
    )*};
}

from_numbers! {
    u8 => U8, i8 => I8, u16 => U16, i16 => I16, u32 => U32, i32 => I32, u64 => U64, i64 => I64, f32 => F32, f64 => F64
}

impl From<&[bool]> for Array {
    fn from(items: &[bool]) -> Self {
        let bytes: Vec<u8> = items.iter().copied().map(u8::from).collect();
        Self {
            item: ValueType::Bool,
            len: items.len(),
            bytes: bytes.into(),
        }
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Self::Text(value.to_owned())
    }
}

impl From<String> for Value {
    fn from(value: String) -> Self {
        Self::Text(value)
    }
}

impl From<Array> for Value {
    fn from(value: Array) -> Self {
        Self::Array(value)
    }
}

/// Scalars as they are, texts quoted, arrays as their type and length.
impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Text(text) => write!(f, "{text:?}"),
            Self::Array(array) => write!(f, "{array:?}"),
            Self::Bool(value) => write!(f, "{value}"),
            Self::F32(value) => write!(f, "{value}"),
            Self::F64(value) => write!(f, "{value}"),
            _ => write!(f, "{}", self.as_integer().unwrap_or_default()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Result<Value, Problem> {
        let whole = Bytes::copy_from_slice(bytes);
        let mut cursor = Cursor::new(bytes);
        let value = Value::read(&mut cursor, &whole)?;
        assert_eq!(cursor.remaining(), 0);
        Ok(value)
    }

    fn round_trip(value: impl Into<Value>) {
        let value = value.into();
        let mut bytes = Vec::new();
        value.write(&mut bytes);
        assert_eq!(read(&bytes).unwrap(), value);
        for cut in 0..bytes.len() {
            assert!(read(&bytes[..cut]).is_err(), "{value:?} cut at {cut}");
        }
    }

    #[test]
    fn every_type_survives_and_no_prefix_is_accepted() {
        round_trip(1u8);
        round_trip(-1i8);
        round_trip(1u16);
        round_trip(-1i16);
        round_trip(1u32);
        round_trip(-1i32);
        round_trip(u64::MAX);
        round_trip(i64::MIN);
        round_trip(1.5f32);
        round_trip(1.5f64);
        round_trip(true);
        round_trip("gr\u{fc}n");
        round_trip(Array::of_texts(["a", "", "bc"]));
        round_trip(Array::from(&[1.0f32, 2.0][..]));
        round_trip(Array::from(&[true, false][..]));
    }

    #[test]
    fn nested_arrays_are_read_to_a_depth() {
        let nest = |depth: usize| {
            let mut bytes = 9u32.to_le_bytes().to_vec();
            for _ in 0..depth {
                bytes.extend(9u32.to_le_bytes());
                bytes.extend(1u64.to_le_bytes());
            }
            bytes.extend(0u32.to_le_bytes());
            bytes.extend(1u64.to_le_bytes());
            bytes.push(7);
            bytes
        };
        let Value::Array(outer) = read(&nest(2)).unwrap() else {
            panic!("not an array")
        };
        let Value::Array(middle) = outer.iter().next().unwrap().unwrap() else {
            panic!("not an array")
        };
        let Value::Array(inner) = middle.iter().next().unwrap().unwrap() else {
            panic!("not an array")
        };
        assert_eq!(inner.iter().next().unwrap().unwrap(), Value::U8(7));
        assert!(read(&nest(4)).is_ok());
        assert!(read(&nest(5)).unwrap_err().contains("more than 4 deep"));
        assert!(read(&nest(100_000)).unwrap_err().contains("deep"));
    }

    #[test]
    fn what_is_wrong_is_said() {
        assert!(read(&99u32.to_le_bytes()).unwrap_err().contains("type 99"));
        let bool_two = [&7u32.to_le_bytes()[..], &[2]].concat();
        assert!(read(&bool_two).unwrap_err().contains("holds 2"));
        let bad = [&8u32.to_le_bytes()[..], &2u64.to_le_bytes(), b"a\xff"].concat();
        assert!(read(&bad).unwrap_err().contains("byte 1"));
        let huge = [
            &9u32.to_le_bytes()[..],
            &0u32.to_le_bytes(),
            &(1u64 << 60).to_le_bytes(),
        ]
        .concat();
        assert!(read(&huge).unwrap_err().contains("array items"));
    }

    #[test]
    fn texts_that_are_not_utf8_are_named_when_asked_for() {
        let mut array = Array::of_texts(["ab", "cd"]);
        let mut bytes = array.bytes.to_vec();
        *bytes.last_mut().unwrap() = 0xff;
        array.bytes = bytes.into();
        assert!(array.texts().unwrap_err().contains("item 1 is not UTF-8"));
        assert!(array.iter().nth(1).unwrap().is_err());
        assert!(
            Array::from(&[1u8][..])
                .texts()
                .unwrap_err()
                .contains("array of u8")
        );
    }
}
