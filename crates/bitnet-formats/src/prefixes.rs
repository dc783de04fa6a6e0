//! Prefixes that wrappers put before tensor names (`module.`, `_orig_mod.`, `language_model.`), and
//! the nearest name of a tensor that is not there.

use crate::arch::Architecture;

/// Names without what wrappers added, if every name then is one of the architecture; `None` where
/// nothing changes or something does not fit.
pub(crate) fn unwrapped<'a>(
    architecture: &Architecture,
    names: impl Iterator<Item = &'a str>,
) -> Option<Vec<String>> {
    let mut changed = false;
    let mut all = vec![];
    for name in names {
        let plain = unwrapped_name(architecture, name)?;
        changed |= plain != name;
        all.push(plain);
    }
    let mut sorted: Vec<&String> = all.iter().collect();
    sorted.sort();
    let distinct = sorted.windows(2).all(|pair| pair[0] != pair[1]);
    (changed && distinct).then_some(all)
}

fn unwrapped_name(architecture: &Architecture, name: &str) -> Option<String> {
    // torch.compile wraps modules at any depth; the others wrap the model.
    let mut plain = name.replace("_orig_mod.", "");
    while let Some(rest) = ["module.", "language_model.", "base_model."]
        .iter()
        .find_map(|prefix| plain.strip_prefix(prefix))
    {
        plain = rest.into();
    }
    let plain = plain.replacen("model.language_model.", "model.", 1);
    let fits = |name: &str| {
        let weight = name.strip_suffix("_scale").unwrap_or(name);
        architecture.gguf_tensor(weight).is_some() || name.ends_with("rotary_emb.inv_freq")
    };
    // A model that was saved without its head has names without `model.`.
    [plain.clone(), format!("model.{plain}")]
        .into_iter()
        .find(|name| fits(name))
}

/// The name that differs least from `name`.
pub(crate) fn nearest<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    names
        .filter(|other| other.len() < 4 * name.len())
        .min_by_key(|other| distance(name, other))
}

/// Number of bytes to insert, remove or replace.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::LLAMA;

    fn read(names: &[&str]) -> Option<Vec<String>> {
        unwrapped(&LLAMA, names.iter().copied())
    }

    #[test]
    fn wrappers_are_taken_off_where_all_names_fit() {
        let q = "model.layers.3.self_attn.q_proj.weight";
        for wrapped in [
            format!("module.{q}"),
            format!("_orig_mod.module.{q}"),
            format!("language_model.{q}"),
            "model.language_model.layers.3.self_attn.q_proj.weight".into(),
            "model.layers.3._orig_mod.self_attn.q_proj.weight".into(),
            "layers.3.self_attn.q_proj.weight".into(),
        ] {
            let names = read(&[&wrapped, "lm_head.weight"]);
            assert_eq!(names.unwrap(), [q, "lm_head.weight"], "{wrapped}");
        }
        assert_eq!(read(&[q]), None, "nothing to do");
        assert_eq!(
            read(&["module.lm_head.weight", "vision_tower.weight"]),
            None
        );
        assert_eq!(read(&["module.lm_head.weight", "lm_head.weight"]), None);
        assert_eq!(
            read(&["module.lm_head.weight_scale"]).unwrap(),
            ["lm_head.weight_scale"]
        );
    }

    #[test]
    fn the_nearest_name() {
        let names = ["a.weight", "lm_head.bias", "lm_heads.weight"];
        let nearest = nearest("lm_head.weight", names.into_iter());
        assert_eq!(nearest, Some("lm_heads.weight"));
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "abc"), 3);
    }
}
