"""Neural attentive circuits (NAC): layers, circuit, graph priors, regularisers, distillation students, assembly."""
