//! What templates expect of python: json.dumps, strftime, `%` and the methods of its types.

use jiff::ZonedDateTime;
use jiff::fmt::strtime;
use minijinja::formatting::{FormatStyle, format};
use minijinja::value::{Kwargs, Tuple, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value, context};
use std::fmt::Write;

/// Deepest value that [`to_json`] writes.
const MAX_DEPTH: usize = 100;

fn invalid(what: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what)
}

/// The filter `tojson` of transformers: python's `json.dumps(value, ensure_ascii=False)`.
pub(super) fn to_json(
    state: &State<'_, '_>,
    value: &Value,
    options: Kwargs,
) -> Result<String, Error> {
    let indent: Option<Value> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let style = JsonStyle {
        indent: match indent.filter(|v| !v.is_none()) {
            None => None,
            Some(v) => Some(match v.as_str() {
                Some(text) => text.to_string(),
                None => " ".repeat(usize::try_from(v)?.min(64)),
            }),
        },
        separators,
        ascii: options.get::<Option<bool>>("ensure_ascii")? == Some(true),
        sorted: options.get::<Option<bool>>("sort_keys")? == Some(true),
    };
    options.assert_all_used()?;
    let mut out = String::new();
    style.write(state, &mut out, value, 0)?;
    Ok(out)
}

struct JsonStyle {
    /// Text of one level; none for a single line.
    indent: Option<String>,
    /// Between items, and after a key.
    separators: Option<Vec<String>>,
    ascii: bool,
    sorted: bool,
}

impl JsonStyle {
    fn separator(&self, index: usize) -> &str {
        let given = self.separators.as_ref().and_then(|s| s.get(index));
        match given {
            Some(text) => text,
            None if index == 1 => ": ",
            None if self.indent.is_some() => ",",
            None => ", ",
        }
    }

    fn line(&self, out: &mut String, depth: usize) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            (0..depth).for_each(|_| out.push_str(indent));
        }
    }

    fn write(
        &self,
        state: &State<'_, '_>,
        out: &mut String,
        value: &Value,
        depth: usize,
    ) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(invalid("tojson: a value that is nested too deeply"));
        }
        let before = out.len();
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => number(out, value),
            ValueKind::String => self.string(out, value.as_str().unwrap_or_default()),
            ValueKind::Seq => {
                let items = value.try_iter()?;
                self.sequence(state, out, items, depth)?;
            }
            ValueKind::Map => self.map(state, out, value, depth)?,
            kind => return Err(invalid(format!("{kind} is not JSON serializable"))),
        }
        state.consume_fuel(1 + (out.len() - before) as u64 / 64)
    }

    fn sequence(
        &self,
        state: &State<'_, '_>,
        out: &mut String,
        items: impl Iterator<Item = Value>,
        depth: usize,
    ) -> Result<(), Error> {
        out.push('[');
        let mut empty = true;
        for item in items {
            if !empty {
                out.push_str(self.separator(0));
            }
            empty = false;
            self.line(out, depth + 1);
            self.write(state, out, &item, depth + 1)?;
        }
        if !empty {
            self.line(out, depth);
        }
        out.push(']');
        Ok(())
    }

    fn map(
        &self,
        state: &State<'_, '_>,
        out: &mut String,
        value: &Value,
        depth: usize,
    ) -> Result<(), Error> {
        let mut keys: Vec<Value> = value.try_iter()?.collect();
        if self.sorted {
            keys.sort();
        }
        out.push('{');
        for (i, key) in keys.iter().enumerate() {
            if i > 0 {
                out.push_str(self.separator(0));
            }
            self.line(out, depth + 1);
            match key.as_str() {
                Some(text) => self.string(out, text),
                None => {
                    let mut text = String::new();
                    self.write(state, &mut text, key, depth + 1)?;
                    self.string(out, &text);
                }
            }
            out.push_str(self.separator(1));
            self.write(state, out, &value.get_item(key)?, depth + 1)?;
        }
        if !keys.is_empty() {
            self.line(out, depth);
        }
        out.push('}');
        Ok(())
    }

    fn string(&self, out: &mut String, text: &str) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || (self.ascii && !c.is_ascii()) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

/// A number as python writes it: a float with an exponent from 1e16, and below 0.0001.
fn number(out: &mut String, value: &Value) {
    let float = (!value.is_integer()).then(|| f64::try_from(value.clone()).ok());
    let text = match float.flatten() {
        None => value.to_string(),
        Some(x) if x.is_nan() => "NaN".into(),
        Some(x) if x.is_infinite() && x > 0.0 => "Infinity".into(),
        Some(x) if x.is_infinite() => "-Infinity".into(),
        Some(x) if x != 0.0 && !(1e-4..1e16).contains(&x.abs()) => {
            let text = format!("{x:e}");
            let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
            let sign = if exponent.starts_with('-') { '-' } else { '+' };
            format!("{digits}e{sign}{:0>2}", exponent.trim_start_matches('-'))
        }
        Some(x) => format!("{x:?}"),
    };
    out.push_str(&text);
}

/// Letters of the directives that python's `strftime` has on Linux.
const DIRECTIVES: &str = "aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZf%";

/// The time as python's `strftime` writes it. What is no directive stays as it is.
pub(super) fn strftime(form: &str, now: &ZonedDateTime) -> String {
    let mut out = String::new();
    let mut rest = form;
    while let Some(start) = rest.find('%') {
        out.push_str(&rest[..start]);
        rest = &rest[start..];
        // A directive: %, flags of glibc, one letter.
        let letter = rest[1..]
            .find(|c| !matches!(c, '-' | '_' | '0' | '^' | '#'))
            .map(|i| i + 1);
        let length = letter.map_or(rest.len(), |i| {
            i + rest[i..].chars().next().map_or(0, char::len_utf8)
        });
        let directive = &rest[..length];
        let known = letter.is_some_and(|i| DIRECTIVES.contains(&rest[i..length]));
        let text = match directive {
            other if !known => Ok(other.to_string()),
            // transformers' time has no zone.
            "%z" | "%Z" => Ok(String::new()),
            // Forms of the C locale.
            "%c" => strtime::format("%a %b %e %H:%M:%S %Y", now),
            "%x" => strtime::format("%m/%d/%y", now),
            "%X" => strtime::format("%H:%M:%S", now),
            "%f" => strtime::format("%6f", now),
            other => strtime::format(other, now),
        };
        match text {
            Ok(text) => out.push_str(&text),
            Err(_) => out.push_str(directive),
        }
        rest = &rest[length..];
    }
    out + rest
}

/// The operator `%`: formats a string, or is the remainder of numbers.
pub(super) fn percent(state: &State<'_, '_>, left: &Value, right: Value) -> Result<Value, Error> {
    let Some(form) = left.as_str() else {
        let both = context! { left => left, right => right };
        return state.env().compile_expression("left % right")?.eval(both);
    };
    // A width is a demand for memory.
    let widest = form
        .split(|c: char| !c.is_ascii_digit())
        .map(|digits| {
            digits
                .parse::<u64>()
                .unwrap_or(u64::from(!digits.is_empty()) << 40)
        })
        .max();
    state.consume_fuel(widest.unwrap_or(0) / 64)?;
    let tuple = right.downcast_object_ref::<Tuple>();
    let arguments = match tuple {
        Some(tuple) => tuple.iter().cloned().collect(),
        None => vec![right],
    };
    format(FormatStyle::Printf, form, &arguments).map(Value::from)
}

/// The filter `wordcount`.
pub(super) fn word_count(text: &str) -> usize {
    text.split(|c: char| !c.is_alphanumeric() && c != '_')
        .filter(|word| !word.is_empty())
        .count()
}

/// The filter `center`.
pub(super) fn center(
    state: &State<'_, '_>,
    text: &str,
    width: Option<usize>,
) -> Result<String, Error> {
    pad(state, text, "center", &[Value::from(width.unwrap_or(80))])
}

/// The filter `truncate`, with jinja's order of arguments.
pub(super) fn truncate(
    text: &str,
    length: Option<usize>,
    kill_words: Option<bool>,
    end: Option<String>,
    options: Kwargs,
) -> Result<String, Error> {
    let length = length.or(options.get("length")?).unwrap_or(255);
    let kill_words = kill_words.or(options.get("killwords")?) == Some(true);
    let end = end.or(options.get("end")?).unwrap_or_else(|| "...".into());
    let leeway = options.get::<Option<usize>>("leeway")?.unwrap_or(5);
    options.assert_all_used()?;
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(text.into());
    }
    let kept = length.saturating_sub(end.chars().count());
    let start: String = text.chars().take(kept).collect();
    Ok(match start.rsplit_once(' ') {
        Some((words, _)) if !kill_words => format!("{words}{end}"),
        _ => start + &end,
    })
}

/// The test `sequence`: what has a length and items, strings and dicts too.
pub(super) fn is_sequence(value: &Value) -> bool {
    matches!(
        value.kind(),
        ValueKind::String | ValueKind::Seq | ValueKind::Map
    )
}

/// Python's methods of strings, lists and dicts.
pub(super) fn method(
    state: &mut State<'_, '_>,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            if let Some(found) = string_method(state, text, name, args)? {
                return Ok(found);
            }
        }
        ValueKind::Seq if name == "index" => {
            let (wanted,): (&Value,) = from_args(args)?;
            let at = value.try_iter()?.position(|item| item == *wanted);
            return at
                .map(Value::from)
                .ok_or_else(|| invalid(format!("{wanted} is not in list")));
        }
        ValueKind::Map | ValueKind::Seq if name == "copy" => return Ok(value.clone()),
        _ => {}
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

/// The methods of strings that minijinja-contrib lacks.
fn string_method(
    state: &State<'_, '_>,
    text: &str,
    name: &str,
    args: &[Value],
) -> Result<Option<Value>, Error> {
    let parts = |a: &str, b: &str, c: &str| Value::from(Tuple::from([a, b, c].map(Value::from)));
    Ok(Some(match name {
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            text.strip_prefix(prefix).unwrap_or(text).into()
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            text.strip_suffix(suffix).unwrap_or(text).into()
        }
        "partition" => {
            let (separator,): (&str,) = from_args(args)?;
            match text.split_once(separator) {
                Some((a, b)) => parts(a, separator, b),
                None => parts(text, "", ""),
            }
        }
        "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            match text.rsplit_once(separator) {
                Some((a, b)) => parts(a, separator, b),
                None => parts("", "", text),
            }
        }
        "rsplit" if !args.is_empty() => {
            let (separator, most): (&str, Option<i64>) = from_args(args)?;
            let most = most
                .and_then(|n| usize::try_from(n).ok())
                .map_or(usize::MAX, |n| n.saturating_add(1));
            let mut all: Vec<Value> = text.rsplitn(most, separator).map(Value::from).collect();
            all.reverse();
            all.into()
        }
        "casefold" => text.to_lowercase().replace('ß', "ss").into(),
        "index" => {
            let (wanted,): (&str,) = from_args(args)?;
            let at = text
                .find(wanted)
                .ok_or_else(|| invalid("substring not found"))?;
            text[..at].chars().count().into()
        }
        "zfill" | "ljust" | "rjust" | "center" => pad(state, text, name, args)?.into(),
        _ => return Ok(None),
    }))
}

/// `zfill`, `ljust`, `rjust` and `center`.
fn pad(state: &State<'_, '_>, text: &str, name: &str, args: &[Value]) -> Result<String, Error> {
    let (width, fill): (usize, Option<char>) = from_args(args)?;
    let missing = width.saturating_sub(text.chars().count());
    state.consume_fuel(missing as u64 / 16)?;
    let fill = match name {
        "zfill" => '0',
        _ => fill.unwrap_or(' '),
    };
    let left = match name {
        "ljust" => 0,
        // As CPython rounds it.
        "center" => missing / 2 + (missing & width & 1),
        _ => missing,
    };
    let (sign, digits) = match text.chars().next() {
        Some('+' | '-') if name == "zfill" => text.split_at(1),
        _ => ("", text),
    };
    let fills = |n: usize| std::iter::repeat_n(fill, n).collect::<String>();
    Ok(format!(
        "{sign}{}{digits}{}",
        fills(left),
        fills(missing - left)
    ))
}
