//! Stop strings in a stream of text: text that may be the start of one is held back.

/// Watches for several stop strings.
#[derive(Debug, Clone, Default)]
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
    /// Index of the stop string that came.
    found: Option<usize>,
}

/// What came of a piece of text.
#[derive(Debug, PartialEq, Eq)]
pub struct Released {
    /// Text that is certainly not part of a stop string.
    pub text: String,
    /// A stop string is complete; it and what follows it are not in `text`.
    pub stopped: bool,
}

impl StopMatcher {
    /// A matcher; empty strings are ignored.
    #[must_use]
    pub fn new(stops: &[String]) -> Self {
        let stops = stops
            .iter()
            .filter(|stop| !stop.is_empty())
            .cloned()
            .collect();
        Self {
            stops,
            held: String::new(),
            found: None,
        }
    }

    /// Takes the next piece. Of several complete stop strings the one that starts first counts.
    #[must_use]
    pub fn push(&mut self, piece: &str) -> Released {
        self.held.push_str(piece);
        let found = self.stops.iter().enumerate();
        let found = found.filter_map(|(index, stop)| Some((self.held.find(stop)?, index)));
        if let Some((at, index)) = found.min() {
            self.found = Some(index);
            self.held.truncate(at);
            return Released {
                text: std::mem::take(&mut self.held),
                stopped: true,
            };
        }
        let keep = self
            .stops
            .iter()
            .map(|stop| overlap(&self.held, stop))
            .max()
            .unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        Released {
            text: std::mem::replace(&mut self.held, rest),
            stopped: false,
        }
    }

    /// The stop string that came.
    #[must_use]
    pub fn found(&self) -> Option<&str> {
        self.found.map(|index| self.stops[index].as_str())
    }

    /// What is held back at the end of the text.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Length of the longest end of `text` that `stop` begins with.
fn overlap(text: &str, stop: &str) -> usize {
    let starts = (0..=text.len()).filter(|at| text.is_char_boundary(*at));
    let mut ends = starts
        .map(|at| &text[at..])
        .filter(|end| stop.starts_with(end));
    ends.next().map_or(0, str::len)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matcher(stops: &[&str]) -> StopMatcher {
        let stops: Vec<String> = stops.iter().map(|stop| (*stop).to_owned()).collect();
        StopMatcher::new(&stops)
    }

    fn released(text: &str, stopped: bool) -> Released {
        Released {
            text: text.to_owned(),
            stopped,
        }
    }

    #[test]
    fn a_stop_string_over_several_pieces_never_shows() {
        let mut stops = matcher(&["\n\n", "END"]);
        assert_eq!(stops.push("a\n"), released("a", false));
        assert_eq!(stops.push("b E"), released("\nb ", false));
        assert_eq!(stops.push("N"), released("", false));
        assert_eq!(stops.found(), None);
        assert_eq!(stops.push("D of"), released("", true));
        assert_eq!(stops.found(), Some("END"));
    }

    #[test]
    fn what_only_looked_like_one_is_given_back() {
        let mut stops = matcher(&["END"]);
        assert_eq!(stops.push("EN"), released("", false));
        assert_eq!(stops.push("E"), released("EN", false));
        assert_eq!(stops.finish(), "E");
        assert_eq!(matcher(&[]).push("anything"), released("anything", false));
        assert_eq!(matcher(&[""]).push("anything"), released("anything", false));
    }

    #[test]
    fn the_first_one_counts_and_characters_stay_whole() {
        assert_eq!(matcher(&["cd", "bc"]).push("abcd"), released("a", true));
        assert_eq!(
            matcher(&["\u{e9}!"]).push("caf\u{e9}"),
            released("caf", false)
        );
    }
}
