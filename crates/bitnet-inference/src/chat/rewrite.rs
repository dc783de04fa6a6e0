//! Rewrites a template of transformers into the jinja that minijinja parses, and bounds what its
//! parser would recurse on.
//!
//! - `{% generation %}…{% endgeneration %}` marks what the model said, for training; it becomes a
//!   scope without variables.
//! - `a % b` becomes `printf_or_remainder(a, b)`, because minijinja formats no strings with `%`.

use std::mem::take;

/// Name of the function that stands for the operator `%`.
pub(super) const PERCENT: &str = "printf_or_remainder";

/// Most operations in one expression, and `elif` in one `if`: the parser recurses on them.
const MAX_CHAIN: usize = 250;

/// Deepest nesting of brackets, and of the calls that stand for `%`.
const MAX_DEPTH: usize = 32;

/// Words that end a term, as operators of lower precedence than `%` do.
const LOW_WORDS: [&str; 13] = [
    "and", "or", "not", "in", "if", "elif", "else", "for", "set", "call", "filter", "with", "do",
];

/// Operators of two characters.
const DOUBLE: [&str; 6] = ["**", "//", "==", "!=", "<=", ">="];

/// The text for minijinja.
pub(super) fn rewrite(text: &str) -> Result<String, String> {
    let mut rewriter = Rewriter {
        text,
        at: 0,
        out: String::with_capacity(text.len()),
        elifs: vec![],
    };
    while let Some(open) = rewriter.next_tag() {
        match open {
            "{#" => rewriter.copy_through("#}"),
            "{{" => rewriter.expression("}}")?,
            _ => rewriter.block()?,
        }
    }
    Ok(rewriter.out)
}

struct Rewriter<'t> {
    text: &'t str,
    /// Everything before is in `out`.
    at: usize,
    out: String,
    /// Number of `elif` of each open `if`.
    elifs: Vec<usize>,
}

/// What an expression is cut into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A string, a number, a closing bracket, or a name that is no word of [`LOW_WORDS`].
    Operand,
    Open,
    Close,
    Comma,
    Percent,
    /// An operator as strong as `%`.
    Equal,
    /// An operator that is weaker than `%`.
    Low,
    /// An operator that is stronger than `%`.
    High,
}

/// An open bracket, or the whole expression.
#[derive(Debug, Default)]
struct Group {
    /// Where in `out` the current term of `%`, `*` and `/` begins.
    term: Option<usize>,
    /// Whether a call waits for its closing bracket.
    pending: bool,
    /// Number of operations so far, with those of the groups around.
    operations: usize,
    /// That number at the start of the group.
    inherited: usize,
    /// Deepest nesting inside.
    depth: usize,
}

impl<'t> Rewriter<'t> {
    fn rest(&self) -> &'t str {
        &self.text[self.at..]
    }

    /// Copies `bytes` bytes.
    fn copy(&mut self, bytes: usize) {
        self.out.push_str(&self.rest()[..bytes]);
        self.at += bytes;
    }

    /// Copies up to and with `end`, or everything if it is missing.
    fn copy_through(&mut self, end: &str) {
        let rest = self.rest();
        self.copy(rest.find(end).map_or(rest.len(), |i| i + end.len()));
    }

    /// Copies the text before the next tag; the first two characters of the tag.
    fn next_tag(&mut self) -> Option<&'t str> {
        let rest = self.rest();
        let found = rest
            .match_indices('{')
            .map(|(i, _)| i)
            .find(|&i| matches!(rest.as_bytes().get(i + 1), Some(b'{' | b'%' | b'#')));
        self.copy(found.unwrap_or(rest.len()));
        found.map(|i| &rest[i..i + 2])
    }

    /// A `{% … %}`.
    fn block(&mut self) -> Result<(), String> {
        let rest = self.rest();
        let inner = rest[2..].trim_start_matches(['-', '+']).trim_start();
        let name = &inner[..name_length(inner)];
        let end = inner[name.len()..].trim_start();
        let alone = end.trim_start_matches(['-', '+']).starts_with("%}");
        match name {
            "raw" if alone => {
                self.copy_through("%}");
                self.raw();
                return Ok(());
            }
            "generation" | "endgeneration" if alone => {
                let before = rest.len() - inner.len();
                let scope = if name == "generation" {
                    "with"
                } else {
                    "endwith"
                };
                self.copy(before);
                self.out.push_str(scope);
                self.at += name.len();
                self.copy_through("%}");
                return Ok(());
            }
            "if" => self.elifs.push(0),
            "elif" => {
                let count = self.elifs.last_mut();
                if let Some(count) = count {
                    *count += 1;
                    if *count > MAX_CHAIN {
                        return Err(format!("an if with more than {MAX_CHAIN} elif"));
                    }
                }
            }
            "endif" => drop(self.elifs.pop()),
            _ => {}
        }
        // The statement's name is no operand.
        self.copy(rest.len() - inner.len() + name.len());
        self.expression("%}")
    }

    /// Copies a raw block through the tag that ends it.
    fn raw(&mut self) {
        loop {
            let rest = self.rest();
            let Some(tag) = rest.find("{%") else {
                self.copy(rest.len());
                return;
            };
            let inner = rest[tag + 2..].trim_start_matches(['-', '+']).trim_start();
            let ends = inner.starts_with("endraw");
            self.copy(tag + 2);
            if ends {
                self.copy_through("%}");
                return;
            }
        }
    }

    /// Copies an expression through the tag's end, and writes each `%` as a call.
    fn expression(&mut self, end: &str) -> Result<(), String> {
        if self.rest().starts_with("{{") {
            self.copy(2);
            let rest = self.rest();
            let signs = rest.starts_with(['-', '+']);
            self.copy(usize::from(signs));
        }
        let mut groups = vec![Group::default()];
        let mut before = Kind::Low;
        let mut member = false;
        loop {
            let rest = self.rest();
            let blank = rest.len() - rest.trim_start().len();
            self.copy(blank);
            let rest = self.rest();
            let unsigned = rest.strip_prefix(['-', '+']).unwrap_or(rest);
            if rest.is_empty() || (groups.len() == 1 && unsigned.starts_with(end)) {
                finish(&mut self.out, groups.last_mut());
                self.copy_through(end);
                return Ok(());
            }
            let (length, kind) = token(rest, before, member);
            member = match &rest[..length] {
                "." | "|" | "is" => true,
                word => member && word == "not",
            };
            self.push(&mut groups, length, kind)?;
            before = if kind == Kind::Close {
                Kind::Operand
            } else {
                kind
            };
        }
    }

    /// Copies one token of an expression.
    fn push(&mut self, groups: &mut Vec<Group>, length: usize, kind: Kind) -> Result<(), String> {
        if kind == Kind::Close {
            finish(&mut self.out, groups.last_mut());
            if groups.len() > 1 {
                let inner = groups.pop().map_or(0, |g| g.depth);
                if let Some(group) = groups.last_mut() {
                    group.deepen(inner.max(group.depth))?;
                }
            }
            self.copy(length);
            return Ok(());
        }
        let Some(group) = groups.last_mut() else {
            return Ok(());
        };
        if kind == Kind::Comma {
            group.operations = group.inherited;
        } else if kind != Kind::Operand {
            group.operations += 1;
            if group.operations > MAX_CHAIN {
                return Err(format!("an expression of more than {MAX_CHAIN} operations"));
            }
        }
        match kind {
            Kind::Comma | Kind::Low => {
                finish(&mut self.out, Some(group));
                group.term = None;
            }
            Kind::Equal | Kind::Percent => finish(&mut self.out, Some(group)),
            _ => {}
        }
        if let (Kind::Percent, Some(term)) = (kind, group.term) {
            group.deepen(group.depth)?;
            self.out.insert_str(term, &format!("{PERCENT}("));
            self.out.push(',');
            self.at += length;
            group.pending = true;
            return Ok(());
        }
        if !matches!(kind, Kind::Comma | Kind::Low) {
            group.term.get_or_insert(self.out.len());
        }
        let inherited = group.operations;
        self.copy(length);
        if kind == Kind::Open {
            Group::default().deepen(groups.len())?;
            groups.push(Group {
                operations: inherited,
                inherited,
                ..Group::default()
            });
        }
        Ok(())
    }
}

impl Group {
    /// Sets the depth to one more than `inner`.
    fn deepen(&mut self, inner: usize) -> Result<(), String> {
        self.depth = inner + 1;
        if self.depth > MAX_DEPTH {
            return Err(format!(
                "an expression that is nested more than {MAX_DEPTH} deep"
            ));
        }
        Ok(())
    }
}

/// Closes the call that waits in a group.
fn finish(out: &mut String, group: Option<&mut Group>) {
    if group.is_some_and(|g| take(&mut g.pending)) {
        let end = out.trim_end().len();
        out.insert(end, ')');
    }
}

/// Length of the name that a text starts with.
fn name_length(text: &str) -> usize {
    text.find(|c: char| !c.is_alphanumeric() && c != '_')
        .unwrap_or(text.len())
}

/// Length and kind of the token at the start of `text`, which is not empty. `before` is the token
/// before it; `member` says that a name is that of an attribute, a filter or a test.
fn token(text: &str, before: Kind, member: bool) -> (usize, Kind) {
    let first = text.chars().next().unwrap_or(' ');
    if matches!(first, '"' | '\'') {
        let mut escaped = false;
        let end = text[1..].find(|c| {
            let ends = c == first && !escaped;
            escaped = c == '\\' && !escaped;
            ends
        });
        return (end.map_or(text.len(), |i| i + 2), Kind::Operand);
    }
    let length = name_length(text);
    if length > 0 {
        let word = &text[..length];
        let kind = match word {
            _ if member => Kind::Operand,
            "is" => Kind::High,
            _ if LOW_WORDS.contains(&word) => Kind::Low,
            _ => Kind::Operand,
        };
        return (length, kind);
    }
    let length = DOUBLE
        .iter()
        .find(|d| text.starts_with(**d))
        .map_or(first.len_utf8(), |d| d.len());
    let kind = match &text[..length] {
        "(" | "[" | "{" => Kind::Open,
        ")" | "]" | "}" => Kind::Close,
        "," => Kind::Comma,
        "%" => Kind::Percent,
        "*" | "/" | "//" => Kind::Equal,
        "." | "|" | "**" => Kind::High,
        // A sign.
        "-" | "+" if before != Kind::Operand => Kind::High,
        _ => Kind::Low,
    };
    (length, kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percent_is_a_call_with_the_operands_of_python() {
        for (text, want) in [
            ("{{ 'a%d' % 1 }}", "{{ P('a%d', 1) }}"),
            ("{{ a + b % c + d }}", "{{ a + P(b, c) + d }}"),
            ("{{ a * b % c % -d * e }}", "{{ P(P(a * b, c), -d) * e }}"),
            ("{%- if i % 2 == 0 -%}", "{%- if P(i, 2) == 0 -%}"),
            (
                "{{ x ~ '%s' % (a % b, c) ~ y }}",
                "{{ x ~ P('%s', (P(a, b), c)) ~ y }}",
            ),
            (
                "{{ m['a' % b].c % d|e(1 % 2) }}",
                "{{ P(m[P('a', b)].c, d|e(P(1, 2))) }}",
            ),
            ("{{ not a % b and c }}", "{{ not P(a, b) and c }}"),
            (
                "{% set x = {'a': 7 % 2, 'b': -7 % 2} %}",
                "{% set x = {'a': P(7, 2), 'b': P(-7, 2)} %}",
            ),
            ("{{- a % b -}} % {# % #}", "{{- P(a, b) -}} % {# % #}"),
            (
                "{% raw %}{{ a % b }}{%- endraw %}{{ '}}' % a }}",
                "{% raw %}{{ a % b }}{%- endraw %}{{ P('}}', a) }}",
            ),
            (
                "{{ a % 2 is odd }}{{ a.not % 2 }}",
                "{{ P(a, 2 is odd) }}{{ P(a.not, 2) }}",
            ),
        ] {
            let squeezed = rewrite(text)
                .unwrap()
                .replace(PERCENT, "P")
                .replace(" ,", ",");
            assert_eq!(squeezed, want, "{text}");
        }
    }

    #[test]
    fn generation_is_a_scope_and_nothing_else_changes() {
        for (text, want) in [
            (
                "a{%- generation -%} b {%+ endgeneration %}",
                "a{%- with -%} b {%+ endwith %}",
            ),
            (
                "{% raw %}{% generation %}{% endraw %}{{ '{% generation %}' }}{# {% generation %} #}",
                "{% raw %}{% generation %}{% endraw %}{{ '{% generation %}' }}{# {% generation %} #}",
            ),
            (
                "{% set generation = 1 %}{{ { 'a': {'b': 1}} }} {",
                "{% set generation = 1 %}{{ { 'a': {'b': 1}} }} {",
            ),
            ("{{ unclosed 'é", "{{ unclosed 'é"),
            ("{%", "{%"),
            ("{{", "{{"),
            ("{{ ) ] } x", "{{ ) ] } x"),
        ] {
            assert_eq!(rewrite(text).unwrap(), want, "{text}");
        }
    }

    #[test]
    fn what_would_exhaust_the_stack_is_refused() {
        for text in [
            format!("{{{{ {}1 }}}}", "-".repeat(20_000)),
            format!("{{{{ {}1 }}}}", "1+".repeat(20_000)),
            format!("{{{{ a{} }}}}", "|trim".repeat(20_000)),
            format!("{{{{ a{} }}}}", ".b".repeat(20_000)),
            format!("{{{{ {}a }}}}", "not ".repeat(20_000)),
            format!("{{% if a %}}{}{{% endif %}}", "{% elif a %}".repeat(20_000)),
        ] {
            assert!(
                rewrite(&text).unwrap_err().contains("more than"),
                "{}",
                &text[..20]
            );
        }
        let list = format!("{{{{ [{}] }}}}", "-1, ".repeat(20_000));
        assert_eq!(rewrite(&list).unwrap(), list);
    }
}
