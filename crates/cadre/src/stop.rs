//! Stop strings in a stream of text: text that may be the start of one is held back.

/// Watches for several stop strings.
#[derive(Debug, Clone, Default)]
pub(crate) struct StopMatcher {
    stops: Vec<String>,
    held: String,
}

/// What came of a piece of text.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Released {
    /// Text that is certainly not part of a stop string.
    pub(crate) text: String,
    /// A stop string is complete; it and what follows it are not in `text`.
    pub(crate) stopped: bool,
}

impl StopMatcher {
    /// A matcher; empty strings are ignored.
    pub(crate) fn new(stops: &[String]) -> Self {
        let stops = stops
            .iter()
            .filter(|stop| !stop.is_empty())
            .cloned()
            .collect();
        Self {
            stops,
            held: String::new(),
        }
    }

    /// Takes the next piece. Of several complete stop strings the one that starts first counts.
    pub(crate) fn push(&mut self, piece: &str) -> Released {
        self.held.push_str(piece);
        if let Some(at) = self
            .stops
            .iter()
            .filter_map(|stop| self.held.find(stop))
            .min()
        {
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

    /// What is held back at the end of the text.
    pub(crate) fn finish(&mut self) -> String {
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
        assert_eq!(stops.push("D of"), released("", true));
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
