"""Turns names in code, such as `jax.vmap`, into links, on every page of the site.

MkDocs calls it while it builds. Sphinx inventories would do the same, but they have to
be downloaded; these names and addresses are the few that the pages use.
"""

import re

JAX = "https://docs.jax.dev/en/latest/_autosummary/{}.html"
OPTAX = "https://optax.readthedocs.io/en/latest/api/{}.html#{}"
FLAX = "https://flax.readthedocs.io/en/latest/api_reference/{}#{}"

JAX_NAMES = """
    Array ShapeDtypeStruct block_until_ready checkpoint custom_vjp eval_shape grad jit
    make_jaxpr pmap remat shard_map value_and_grad vjp vmap
    debug.callback debug.print lax.cond lax.pmean lax.psum lax.scan lax.stop_gradient
    random.fold_in random.key random.split tree.map
"""
OPTAX_NAMES = {
    "apply_updates": "apply_updates",
    "combining_optimizers": "chain multi_transform partition",
    "contrib": "contrib.differentially_private_aggregate contrib.muon contrib.sam",
    "optimizer_schedules": "inject_hyperparams join_schedules linear_schedule",
    "optimizer_wrappers": "MultiSteps apply_if_finite masked skip_not_finite",
    "optimizers": "adafactor adam adamw lbfgs lion sgd",
    "transformations": """
        GradientTransformation GradientTransformationExtraArgs apply_every
        clip_by_global_norm ema set_to_zero
    """,
}
LINKS = {
    **{f"jax.{name}": JAX.format(f"jax.{name}") for name in JAX_NAMES.split()},
    **{
        f"optax.{name}": OPTAX.format(page, f"optax.{name}")
        for page, names in OPTAX_NAMES.items()
        for name in names.split()
    },
    "flax.training.train_state.TrainState": FLAX.format(
        "flax.training.html", "flax.training.train_state.TrainState"
    ),
    "nnx.Optimizer": FLAX.format(
        "flax.nnx/training/optimizer.html", "flax.nnx.optimizer.Optimizer"
    ),
    **{
        f"nnx.{name}": FLAX.format("flax.nnx/transforms.html", f"flax.nnx.{name}")
        for name in ("grad", "jit", "value_and_grad")
    },
}
# Code in running text; what is already a link, a heading or a block stays as it is.
SKIPPED = r"<(?P<tag>a|pre|h[1-6])\b.*?</(?P=tag)>"
CODE = r"<code>(?P<name>[\w.]+)</code>"
PATTERN = re.compile(f"{SKIPPED}|{CODE}", re.DOTALL)


def on_env(env, config, **_):
    """Links the types in signatures."""
    references = config.plugins["autorefs"]
    for name, address in LINKS.items():
        references.register_url(name, address)
    return env


def on_post_page(output, page, config):
    """Links the names in the finished page."""
    api = {"api/": "", "": "api/"}.get(page.url, "../api/")

    def link(match):
        name = match["name"]
        if name is None:
            return match[0]
        address = LINKS.get(name)
        if name.startswith("oa.") and name.removeprefix("oa.") in config.api_names:
            address = f"{api}#optax_accum.{name.removeprefix('oa.')}"
        return f'<a href="{address}">{match[0]}</a>' if address else match[0]

    return PATTERN.sub(link, output)


def on_config(config):
    """Reads which names the API page documents."""
    with open(f"{config.docs_dir}/api.md", encoding="utf-8") as page:
        config.api_names = set(re.findall(r"::: optax_accum\.(\S+)", page.read()))
    return config
