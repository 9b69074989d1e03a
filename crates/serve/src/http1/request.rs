//! The head of a request, how its body is framed, and reading that body.

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_LENGTH, EXPECT, TRANSFER_ENCODING};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, Version};
use tokio::io::AsyncRead;

use super::reader::{Pace, ReadError, Reader};

/// Fields of a head.
const MOST_FIELDS: usize = 64;
/// Bytes of a head.
const MOST_HEAD: usize = 32 << 10;
/// Bytes of a chunk's first line, and of all lines after the last chunk.
const MOST_LINE: usize = 4 << 10;

/// Why a request cannot be read. The connection ends after the answer.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) status: StatusCode,
    pub(crate) message: String,
}

impl Refused {
    fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
        }
    }

    fn bad(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }
}

/// How long a body is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    /// So many bytes; 0 where nothing is said.
    Length(u64),
    /// In chunks, each with its length.
    Chunked,
}

/// A head, understood.
#[derive(Debug)]
pub(crate) struct Head {
    pub(crate) request: http::Request<()>,
    pub(crate) framing: Framing,
    /// Another request may follow.
    pub(crate) stays: bool,
    /// The client waits for a word before it sends the body.
    pub(crate) waits: bool,
}

/// Parses the head at the start of `buffer`, and its length; `None` while it is incomplete.
pub(crate) fn parse(buffer: &[u8]) -> Result<Option<(Head, usize)>, Refused> {
    let mut fields = [httparse::EMPTY_HEADER; MOST_FIELDS];
    let mut parsed = httparse::Request::new(&mut fields);
    let n_bytes = match parsed.parse(buffer) {
        Ok(httparse::Status::Complete(n_bytes)) => n_bytes,
        Ok(httparse::Status::Partial) if buffer.len() < MOST_HEAD => return Ok(None),
        Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
            let message = format!(
                "the request's head is too large; at most {MOST_FIELDS} fields and {MOST_HEAD} bytes are read"
            );
            return Err(Refused::new(
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                message,
            ));
        }
        Err(error) => return Err(Refused::bad(format!("this is not HTTP/1.1: {error}"))),
    };
    let headers = headers(parsed.headers)?;
    let version = match parsed.version {
        Some(0) => Version::HTTP_10,
        _ => Version::HTTP_11,
    };
    let bad = || Refused::bad("the request line has no proper method and path");
    let method = Method::from_bytes(parsed.method.unwrap_or_default().as_bytes());
    let uri: Option<Uri> = parsed.path.unwrap_or_default().parse().ok();
    let mut request = http::Request::new(());
    *request.method_mut() = method.map_err(|_| bad())?;
    *request.uri_mut() = uri.ok_or_else(bad)?;
    *request.version_mut() = version;
    let head = Head {
        framing: framing(&headers, version)?,
        stays: version == Version::HTTP_11 && !has_word(&headers, &CONNECTION, "close"),
        waits: has_word(&headers, &EXPECT, "100-continue"),
        request: {
            *request.headers_mut() = headers;
            request
        },
    };
    Ok(Some((head, n_bytes)))
}

fn headers(fields: &[httparse::Header<'_>]) -> Result<HeaderMap, Refused> {
    let mut headers = HeaderMap::with_capacity(fields.len());
    for field in fields {
        let name = HeaderName::from_bytes(field.name.as_bytes());
        let value = HeaderValue::from_bytes(field.value);
        let (Ok(name), Ok(value)) = (name, value) else {
            let message = format!("the field `{}` of the head is not proper", field.name);
            return Err(Refused::bad(message));
        };
        headers.append(name, value);
    }
    Ok(headers)
}

/// Whether a field of comma-separated words has `word`.
fn has_word(headers: &HeaderMap, name: &HeaderName, word: &str) -> bool {
    let values = headers.get_all(name).iter();
    let mut words = values
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','));
    words.any(|one| one.trim().eq_ignore_ascii_case(word))
}

/// Whatever two programs could read differently is refused, so that no request hides in another's body.
fn framing(headers: &HeaderMap, version: Version) -> Result<Framing, Refused> {
    let mut lengths = headers.get_all(CONTENT_LENGTH).iter();
    let length = lengths.next();
    if lengths.next().is_some() {
        return Err(Refused::bad("the request says twice how long it is"));
    }
    if headers.contains_key(TRANSFER_ENCODING) {
        let mut encodings = headers.get_all(TRANSFER_ENCODING).iter();
        let first = encodings.next().map(HeaderValue::as_bytes);
        let chunked = first.is_some_and(|encoding| encoding.eq_ignore_ascii_case(b"chunked"));
        if length.is_some() || version == Version::HTTP_10 {
            return Err(Refused::bad(
                "Transfer-Encoding goes neither with Content-Length nor with HTTP/1.0",
            ));
        }
        return match chunked && encodings.next().is_none() {
            true => Ok(Framing::Chunked),
            false => Err(Refused::new(
                StatusCode::NOT_IMPLEMENTED,
                "the only Transfer-Encoding that is read is chunked",
            )),
        };
    }
    let Some(length) = length else {
        return Ok(Framing::Length(0));
    };
    let digits = length
        .to_str()
        .ok()
        .filter(|digits| !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_digit()));
    let length = digits.and_then(|digits| digits.parse().ok());
    length
        .map(Framing::Length)
        .ok_or_else(|| Refused::bad("Content-Length is not a number"))
}

/// Reads a body of at most `most` bytes.
pub(crate) async fn body<R: AsyncRead + Unpin>(
    reader: &mut Reader<R>,
    framing: Framing,
    most: usize,
    mut pace: Pace,
) -> Result<Bytes, Refused> {
    let mut body = Vec::new();
    let read = match framing {
        Framing::Length(n) => {
            let n = usize::try_from(n).unwrap_or(usize::MAX);
            if n > most {
                return Err(too_large(most));
            }
            reader.take(n, &mut body, &mut pace).await.map_err(broken)
        }
        Framing::Chunked => chunks(reader, &mut body, most, &mut pace).await,
    };
    read.map(|()| Bytes::from(body))
}

async fn chunks<R: AsyncRead + Unpin>(
    reader: &mut Reader<R>,
    body: &mut Vec<u8>,
    most: usize,
    pace: &mut Pace,
) -> Result<(), Refused> {
    loop {
        let line = reader.line(MOST_LINE, pace).await.map_err(broken)?;
        let size = chunk_size(&line)?;
        if size == 0 {
            break;
        }
        if size > most - body.len() {
            return Err(too_large(most));
        }
        reader.take(size, body, pace).await.map_err(broken)?;
        let end = reader.line(MOST_LINE, pace).await.map_err(broken)?;
        if !end.is_empty() {
            return Err(Refused::bad("a chunk of the body is longer than it says"));
        }
    }
    // Fields after the last chunk mean nothing here.
    let mut n_left = MOST_LINE;
    loop {
        let line = reader.line(n_left, pace).await.map_err(broken)?;
        if line.is_empty() {
            return Ok(());
        }
        n_left = n_left.saturating_sub(line.len() + 1);
    }
}

fn chunk_size(line: &[u8]) -> Result<usize, Refused> {
    let digits = line.split(|byte| *byte == b';').next().unwrap_or_default();
    let digits = std::str::from_utf8(digits).unwrap_or_default().trim_end();
    let proper =
        (1..=15).contains(&digits.len()) && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    let size = usize::from_str_radix(digits, 16).ok();
    size.filter(|_| proper)
        .ok_or_else(|| Refused::bad("a chunk of the body does not say how long it is"))
}

fn too_large(most: usize) -> Refused {
    let message =
        format!("the request's body is larger than {most} bytes, the most that is read here");
    Refused::new(StatusCode::PAYLOAD_TOO_LARGE, message)
}

fn broken(error: ReadError) -> Refused {
    match error {
        ReadError::Slow => Refused::new(
            StatusCode::REQUEST_TIMEOUT,
            "the request's body arrives too slowly",
        ),
        ReadError::Long => Refused::bad("a line of the chunked body is too long"),
        // Nobody reads these.
        ReadError::Gone | ReadError::Io => Refused::bad("the request's body is incomplete"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(fields: &str) -> Result<Option<(Head, usize)>, Refused> {
        parse(format!("POST /v1/x?y=1 HTTP/1.1\r\nHost: a\r\n{fields}\r\n").as_bytes())
    }

    #[track_caller]
    fn refused(fields: &str) -> (u16, String) {
        let error = head(fields).unwrap_err();
        (error.status.as_u16(), error.message)
    }

    #[test]
    fn heads_are_understood() {
        let (parsed, n) = head("Content-Length: 12\r\nExpect: 100-Continue\r\n")
            .unwrap()
            .unwrap();
        assert_eq!(parsed.framing, Framing::Length(12));
        assert!(parsed.stays && parsed.waits && n > 60);
        assert_eq!(parsed.request.uri().path(), "/v1/x");
        let (parsed, _) = head("transfer-encoding: Chunked\r\nConnection: TE, close\r\n")
            .unwrap()
            .unwrap();
        assert_eq!(parsed.framing, Framing::Chunked);
        assert!(!parsed.stays);
        let (parsed, _) = parse(b"GET / HTTP/1.0\r\n\r\n").unwrap().unwrap();
        assert_eq!(parsed.framing, Framing::Length(0));
        assert!(!parsed.stays);
        assert!(parse(b"POST / HTTP/1.1\r\nHost").unwrap().is_none());
    }

    #[test]
    fn what_could_be_read_in_two_ways_is_refused() {
        for fields in [
            "Content-Length: 1\r\nContent-Length: 2\r\n",
            "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n",
            "Content-Length: +1\r\n",
            "Content-Length: 1, 1\r\n",
            "Content-Length: 99999999999999999999999\r\n",
            "Content-Length : 1\r\n",
        ] {
            assert_eq!(refused(fields).0, 400, "{fields}");
        }
        assert_eq!(refused("Transfer-Encoding: gzip, chunked\r\n").0, 501);
        let fields = "A: b\r\n".repeat(MOST_FIELDS);
        assert_eq!(refused(&fields).0, 431);
        let long = vec![b'a'; MOST_HEAD];
        assert_eq!(parse(&long).unwrap_err().status.as_u16(), 431);
        assert_eq!(parse(b"\x16\x03\x01\x02").unwrap_err().status.as_u16(), 400);
    }

    #[test]
    fn chunks_say_how_long_they_are() {
        assert_eq!(chunk_size(b"1F;name=value").unwrap(), 31);
        assert_eq!(chunk_size(b"0").unwrap(), 0);
        for line in ["", ";", "-1", "+1", "1g", "0x1", "1111111111111111"] {
            assert!(chunk_size(line.as_bytes()).is_err(), "{line}");
        }
    }
}
