//! Merges by rank (tokenizer.json) and by score (the `llama` kind of GGUF).
//!
//! llama.cpp's `llama` kind joins the two neighbours whose text is the token of the highest score,
//! whichever they are. Byte pair encoding joins the neighbours of the first merge in a list.

use std::collections::{HashMap, HashSet};

/// Bound on the sum of the squared lengths of tokens, which all splits of them take to examine.
const MAX_WORK: usize = 1 << 30;

/// Rejects tokens that are too long to examine all their splits.
pub(super) fn check_lengths<'a>(tokens: impl Iterator<Item = &'a str>) -> Result<(), String> {
    let mut work = 0usize;
    for token in tokens {
        work = work.saturating_add(token.len().saturating_mul(token.len()));
        if work > MAX_WORK {
            return Err(format!(
                "its tokens are too long to derive merges, one of them with {} bytes",
                token.len()
            ));
        }
    }
    Ok(())
}

/// A list of merges, as byte pair encoding applies it.
pub(super) struct Ranks<'a> {
    ids: HashMap<&'a str, u32>,
    /// Rank and result of the merge of two tokens.
    merges: HashMap<(u32, u32), (u32, u32)>,
}

/// What the merges make of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Made {
    /// One token, by the merge of this rank; none for a single character.
    One(Option<u32>),
    /// Two neighbours that no merge joins.
    Two,
    More,
}

/// Stands for a character that is no token.
const NO_TOKEN: u32 = u32::MAX;

impl<'a> Ranks<'a> {
    /// Fails for a merge of something that is no token.
    pub(super) fn new(
        tokens: &'a [Option<String>],
        merges: &[(String, String)],
    ) -> Result<Self, String> {
        let named = tokens.iter().zip(0u32..);
        let ids: HashMap<&str, u32> = named
            .filter_map(|(token, id)| Some((token.as_deref()?, id)))
            .collect();
        let mut table = HashMap::with_capacity(merges.len());
        for ((a, b), rank) in merges.iter().zip(0u32..) {
            let id = |token: &str| {
                ids.get(token).copied().ok_or_else(|| {
                    format!("the merge '{a}' + '{b}' needs the token '{token}', which is not there")
                })
            };
            // `tokenizers` takes the last of two merges alike.
            table.insert((id(a)?, id(b)?), (rank, id(&format!("{a}{b}"))?));
        }
        Ok(Self { ids, merges: table })
    }

    /// Merges the characters of a text.
    pub(super) fn make(&self, text: &str) -> Made {
        let mut buffer = [0; 4];
        let mut symbols: Vec<u32> = text
            .chars()
            .map(|c| {
                let id = self.ids.get(&*c.encode_utf8(&mut buffer));
                id.copied().unwrap_or(NO_TOKEN)
            })
            .collect();
        let mut last = None;
        loop {
            let pairs = symbols.windows(2).enumerate();
            let first = pairs
                .filter_map(|(at, pair)| {
                    let (rank, id) = self.merges.get(&(pair[0], pair[1]))?;
                    Some((*rank, at, *id))
                })
                .min();
            let Some((rank, at, id)) = first else {
                break;
            };
            symbols[at] = id;
            symbols.remove(at + 1);
            last = Some(rank);
        }
        match symbols.len() {
            0 | 1 => Made::One(last),
            2 => Made::Two,
            _ => Made::More,
        }
    }
}

/// Scores with which llama.cpp's `llama` kind finds the tokens that the merges make. Fails if there
/// are none: for a token that neighbours spell without a merge for them.
///
/// A token's score is minus the rank of the merge that makes it from its characters. Tokens that no
/// merge makes come last. Tokens in `apart` are taken out of the text before anything merges.
pub(super) fn scores_of_merges(
    tokens: &[Option<String>],
    merges: &[(String, String)],
    apart: &HashSet<usize>,
) -> Result<Vec<f32>, String> {
    check_lengths(tokens.iter().flatten().map(String::as_str))?;
    let ranks = Ranks::new(tokens, merges)?;
    let mut scores = Vec::with_capacity(tokens.len());
    for (id, token) in tokens.iter().enumerate() {
        let last = -((merges.len() + id) as f32);
        let merged = token.as_ref().filter(|_| !apart.contains(&id));
        scores.push(match merged.map(|token| (token, ranks.make(token))) {
            Some((_, Made::One(Some(rank)))) => -(rank as f32),
            Some((token, Made::Two)) => {
                return Err(format!(
                    "its merges leave two pieces of the token '{token}' apart"
                ));
            }
            _ => last,
        });
    }
    Ok(scores)
}

/// Whether the merges make every token from its characters, but for those in `apart`.
pub(super) fn makes_all(
    tokens: &[Option<String>],
    merges: &[(String, String)],
    apart: &HashSet<usize>,
) -> Result<bool, String> {
    check_lengths(tokens.iter().flatten().map(String::as_str))?;
    let ranks = Ranks::new(tokens, merges)?;
    let mut merged = tokens.iter().enumerate().filter_map(|(id, token)| {
        let token = token.as_ref()?;
        (!apart.contains(&id)).then_some(token)
    });
    Ok(merged.all(|token| matches!(ranks.make(token), Made::One(_))))
}

/// Merges with which byte pair encoding finds the tokens that llama.cpp's `llama` kind finds, in
/// the order of their rank: each split of a token in two, by the token's score. Of one token, those
/// with the longer first half come first: in a run of one character they are further left.
///
/// Also how many tokens share a score with another: where both could be made, llama.cpp makes the
/// leftmost, and the merges the one with the smaller id.
#[allow(clippy::type_complexity, reason = "a list of pairs and a number")]
pub(super) fn merges_of_scores<'a>(
    tokens: &[(&'a str, f32)],
) -> Result<(Vec<(&'a str, &'a str)>, usize), String> {
    check_lengths(tokens.iter().map(|(token, _)| *token))?;
    let known: HashSet<&str> = tokens.iter().map(|(token, _)| *token).collect();
    let mut merges = vec![];
    let mut made: Vec<f32> = vec![];
    for (id, &(token, score)) in tokens.iter().enumerate() {
        if !score.is_finite() {
            return Err(format!("the token '{token}' has the score {score}"));
        }
        let before = merges.len();
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if known.contains(left) && known.contains(right) {
                merges.push((score, id, left, right));
            }
        }
        if merges.len() > before {
            made.push(score);
        }
    }
    made.sort_by(f32::total_cmp);
    let equal = made.windows(2).filter(|pair| pair[0] == pair[1]).count();
    if equal > 0 && equal + 1 == made.len() {
        return Err("all its scores are equal, so that tokens have no order".into());
    }
    merges.sort_by(|a, b| {
        let order = b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        order.then(b.2.len().cmp(&a.2.len()))
    });
    let pairs = merges.into_iter().map(|(_, _, a, b)| (a, b)).collect();
    Ok((pairs, equal))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(tokens: &[&str]) -> Vec<Option<String>> {
        tokens.iter().map(|t| Some(t.to_string())).collect()
    }

    fn pairs(merges: &[(&str, &str)]) -> Vec<(String, String)> {
        let owned = merges.iter().map(|(a, b)| (a.to_string(), b.to_string()));
        owned.collect()
    }

    #[test]
    fn the_score_is_that_of_the_merge_that_happens() {
        // "abc" is listed as a + bc first, but ab merges before bc.
        let tokens = named(&["a", "b", "c", "ab", "bc", "abc"]);
        let merges = pairs(&[("a", "bc"), ("a", "b"), ("b", "c"), ("ab", "c")]);
        let scores = scores_of_merges(&tokens, &merges, &HashSet::new()).unwrap();
        assert_eq!(scores, [-4.0, -5.0, -6.0, -1.0, -2.0, -3.0]);
    }

    #[test]
    fn neighbours_without_a_merge_have_no_scores() {
        let tokens = named(&["a", "b", "ab"]);
        let reason = scores_of_merges(&tokens, &[], &HashSet::new()).unwrap_err();
        assert!(reason.contains("'ab'"), "{reason}");
        assert!(scores_of_merges(&tokens, &[], &HashSet::from([2])).is_ok());
        assert_eq!(makes_all(&tokens, &[], &HashSet::new()), Ok(false));
        let merges = pairs(&[("a", "b")]);
        assert_eq!(makes_all(&tokens, &merges, &HashSet::new()), Ok(true));
        let reason = scores_of_merges(&tokens, &pairs(&[("a", "x")]), &HashSet::new());
        assert!(reason.unwrap_err().contains("'x'"));
    }

    #[test]
    fn merges_are_all_splits_by_score() {
        let tokens = [
            ("a", -9.0),
            ("b", -9.0),
            ("aa", -1.0),
            ("aaa", -2.0),
            ("ab", 0.0),
        ];
        let (merges, equal) = merges_of_scores(&tokens).unwrap();
        let expected = [("a", "b"), ("a", "a"), ("aa", "a"), ("a", "aa")];
        assert_eq!((merges.as_slice(), equal), (&expected[..], 0));
        let same = [("a", 0.0), ("b", 0.0), ("ab", -1.0), ("ba", -1.0)];
        assert!(merges_of_scores(&same).unwrap_err().contains("equal"));
        let bad = [("a", f32::NAN)];
        assert!(merges_of_scores(&bad).unwrap_err().contains("NaN"));
    }

    #[test]
    fn long_tokens_are_refused() {
        let long = "a".repeat(1 << 17);
        let reason = merges_of_scores(&[(&long, 0.0)]).unwrap_err();
        assert!(reason.contains("131072 bytes"), "{reason}");
    }
}
