"""What the import of the package does to SAELens's registry. Each test has its own process."""

from types import SimpleNamespace

from fresh_process import run_python

TRAIN = """
def train():
    import torch
    from sae_lens import TrainingSAE
    from sae_lens.saes.sae import TrainStepInput

    for architecture in ("hierarchical_topk", "flex_topk"):
        sae = TrainingSAE.from_dict(
            {"architecture": architecture, "d_in": 8, "d_sae": 32, "k": 4}
        )
        step = TrainStepInput(
            sae_in=torch.randn(16, 8),
            coefficients={},
            dead_neuron_mask=torch.arange(32) < 16,
            n_training_steps=0,
            is_logging_step=False,
        )
        sae.training_forward_pass(step).loss.backward()
        assert sae.W_dec.grad.isfinite().all() and sae.W_dec.grad.any()
"""


def test_importing_again_is_harmless():
    run_python(
        TRAIN
        + """
import gc, importlib, sys
import sae_lens_flex
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

train()
first = dict(SAE_CLASS_REGISTRY), dict(SAE_TRAINING_CLASS_REGISTRY)

import sae_lens_flex
assert importlib.reload(sae_lens_flex) is sae_lens_flex
assert (SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY) == first
train()

# A notebook's autoreload does this, with the submodules first or last.
for name in sorted(n for n in sys.modules if n.split(".")[0] == "sae_lens_flex"):
    importlib.reload(sys.modules[name])
for name in sorted((n for n in sys.modules if n.split(".")[0] == "sae_lens_flex"), reverse=True):
    importlib.reload(sys.modules[name])
gc.collect()
train()
assert SAE_CLASS_REGISTRY.keys() == first[0].keys()

# A test suite that isolates its modules does this.
for name in [n for n in sys.modules if n.split(".")[0] == "sae_lens_flex"]:
    del sys.modules[name]
del sae_lens_flex
gc.collect()
import sae_lens_flex

gc.collect()
train()
assert SAE_CLASS_REGISTRY["hierarchical_topk"][0] is sae_lens_flex.HierarchicalTopKSAE
assert (
    SAE_TRAINING_CLASS_REGISTRY["flex_topk"][0] is sae_lens_flex.FlexTopKTrainingSAE
)
"""
    )


def test_name_that_another_package_registered_is_an_error_that_says_so():
    run_python(
        """
        import sys
        from sae_lens import registry
        from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
        from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

        class TheirSAE(TopKSAE):
            __module__ = "their_package.saes"

        class TheirTrainingSAE(TopKTrainingSAE):
            __module__ = "their_package.saes"

        theirs = {
            "hierarchical_topk": (
                registry.register_sae_class, TheirSAE, TopKSAEConfig, registry.SAE_CLASS_REGISTRY
            ),
            "flex_topk": (
                registry.register_sae_training_class,
                TheirTrainingSAE,
                TopKTrainingSAEConfig,
                registry.SAE_TRAINING_CLASS_REGISTRY,
            ),
        }
        for name, (register, sae_class, config_class, registered) in theirs.items():
            register(name, sae_class, config_class)
            before = dict(registry.SAE_CLASS_REGISTRY), dict(registry.SAE_TRAINING_CLASS_REGISTRY)
            try:
                import sae_lens_flex
            except ValueError as error:
                assert f"{name!r} is already registered" in str(error), error
                assert f"their_package.saes.{sae_class.__name__}" in str(error), error
            else:
                raise AssertionError("imported")
            assert before == (registry.SAE_CLASS_REGISTRY, registry.SAE_TRAINING_CLASS_REGISTRY)
            del registered[name]

        import sae_lens_flex  # The names are free again.

        assert registry.get_sae_class("hierarchical_topk")[0] is sae_lens_flex.HierarchicalTopKSAE
        """
    )


def test_without_the_import_saelens_raises_a_bare_key_error(trained: dict[str, SimpleNamespace]):
    # README's troubleshooting has this error, "KeyError: 'hierarchical_topk'".
    run_python(
        """
        import sys
        from sae_lens import SAE, TrainingSAE, TrainingSAEConfig

        output, checkpoint = sys.argv[1:]
        for load in (
            lambda: SAE.load_from_disk(output),
            lambda: SAE.load_from_disk(checkpoint),
            lambda: TrainingSAE.load_from_disk(checkpoint),
            lambda: TrainingSAEConfig.from_dict({"architecture": "hierarchical_topk"}),
        ):
            try:
                load()
            except KeyError as error:
                assert str(error) == "'hierarchical_topk'"
            else:
                raise AssertionError("loaded")

        import sae_lens_flex

        SAE.load_from_disk(output)
        """,
        trained["hierarchical_topk"].output,
        trained["hierarchical_topk"].checkpoint,
    )
