//! What accelerators are called.

/// Bytes that a card is sold with, where its memory in GiB is not that number.
const SOLD_AS: [(&str, u64); 7] =
    [("H200", 141), ("B200", 192), ("T4", 16), ("L4", 24), ("A10", 24), ("L40", 48), ("L40S", 48)];

/// The catalogue's name (config/machines.yaml) of what the driver names: `NVIDIA A100-SXM4-40GB` and
/// `NVIDIA A100 80GB PCIe` are an `A100-40GB` and an `A100-80GB`, however they are put into their machines. Cards that it
/// has none of are named alike.
pub(super) fn accelerator(name: &str, memory_bytes: u64) -> String {
    let (card, slice) = match name.split_once(" MIG ") {
        Some((card, profile)) => (card, Some(profile)),
        None => (name, None),
    };
    let words: Vec<&str> = card
        .split([' ', '-'])
        .filter(|word| !word.is_empty() && !["NVIDIA", "Tesla", "GeForce", "Quadro"].contains(word))
        .collect();
    let size = words.iter().find(|word| gigabytes(word).is_some()).map(ToString::to_string);
    let plain = |word: &&&str| {
        let form = ["PCIe", "PCIE", "NVL", "FHHL"].contains(*word) || word.starts_with("SXM");
        !form && !word.starts_with("HBM") && gigabytes(word).is_none()
    };
    let model = words.iter().filter(plain).copied().collect::<Vec<_>>().join("-");
    let size = size.unwrap_or_else(|| {
        let sold = SOLD_AS.iter().find(|(sold, _)| *sold == model).map(|(_, size)| *size);
        let gib = (memory_bytes as f64 / f64::from(1 << 30)).round() as u64;
        format!("{}GB", sold.unwrap_or(gib))
    });
    // A slice's memory is not its card's: its profile says both.
    match slice {
        Some(profile) => format!("{model} MIG {profile}"),
        None => format!("{model}-{size}"),
    }
}

fn gigabytes(word: &str) -> Option<u64> {
    word.strip_suffix("GB")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for (name, mib, want) in [
            ("NVIDIA A100-SXM4-40GB", 40_960, "A100-40GB"),
            ("A100-PCIE-40GB", 40_960, "A100-40GB"),
            ("NVIDIA A100 80GB PCIe", 81_920, "A100-80GB"),
            ("NVIDIA A100-SXM4-80GB", 81_920, "A100-80GB"),
            ("NVIDIA H100 80GB HBM3", 81_559, "H100-80GB"),
            ("NVIDIA H100 PCIe", 81_559, "H100-80GB"),
            ("NVIDIA H100 NVL", 95_830, "H100-94GB"),
            ("NVIDIA H200", 143_771, "H200-141GB"),
            ("NVIDIA H200 NVL", 143_771, "H200-141GB"),
            ("Tesla V100-SXM2-16GB", 16_384, "V100-16GB"),
            ("Tesla V100-SXM3-32GB", 32_768, "V100-32GB"),
            ("Tesla T4", 15_360, "T4-16GB"),
            ("NVIDIA L4", 23_034, "L4-24GB"),
            ("NVIDIA GeForce RTX 4090", 24_564, "RTX-4090-24GB"),
            ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 4_864, "A100 MIG 1g.5gb"),
        ] {
            assert_eq!(accelerator(name, mib << 20), want, "{name}");
        }
        // Whatever the catalogue has is what a driver's name of it comes to.
        for accelerator in config::machines::accelerators() {
            let (card, size) = accelerator.name.rsplit_once('-').unwrap();
            let name = format!("NVIDIA {card}-SXM4-{size}");
            assert_eq!(super::accelerator(&name, accelerator.memory_bytes), accelerator.name);
        }
    }
}
