//! A sweep's budget.

use domain::sweep::Budget;

/// Which part of a budget is spent, if any is.
pub(super) fn spent(budget: &Budget, cost_usd: f64, elapsed_seconds: f64) -> Option<String> {
    match (budget.max_cost_usd, budget.max_wall_clock_seconds) {
        (Some(most), _) if cost_usd >= most => Some(format!("max_cost_usd of ${most} is spent")),
        (_, Some(most)) if elapsed_seconds >= most => Some(format!("max_wall_clock of {most} s is spent")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_part_of_a_budget_that_is_spent() {
        for (max_cost_usd, max_wall_clock_seconds, want) in [
            (None, None, None),
            (Some(2.5), Some(61.0), None),
            (Some(2.0), Some(60.0), Some("max_cost_usd of $2 is spent")),
            (None, Some(60.0), Some("max_wall_clock of 60 s is spent")),
        ] {
            let budget = Budget { max_cost_usd, max_wall_clock_seconds };
            assert_eq!(spent(&budget, 2.0, 60.0).as_deref(), want, "{budget:?}");
        }
    }
}
