"""`Adapter`: the value that `value.py` describes, with files, PEFT models and the Hugging Face Hub around it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.hub import find_folder, push_folder
from .base_model import BaseModel
from .clip_lora import read_clip_lora
from .find import find_siblings
from .lora_vit import is_lora_vit, read_lora_vit
from .peft.config import CONFIG_FILE
from .peft.in_memory import is_peft_model, read_model
from .peft.read import FILES, read_peft
from .peft.write import OWN_HEAD_FILES, write_peft
from .value import SITE_PATTERN, AdapterValue, Head, LoRAFactors

if TYPE_CHECKING:  # a heavy import, needed for one annotation
    from huggingface_hub import CommitInfo

__all__ = ["SITE_PATTERN", "Adapter", "Head", "LoRAFactors"]


class Adapter(AdapterValue):
    """LoRA factors at sites of a ViT, with or without a classification head.

    A site is one linear layer, or one third of a qkv layer: `blocks.3.attn.q`, `.k`, `.v`, `blocks.3.attn.proj`,
    `blocks.3.mlp.fc1`, `blocks.3.mlp.fc2`. Ranks and scalings may differ between sites.

    Attributes:
        factors: site -> `LoRAFactors`; kept in float32, sites in model order.
        head: classifier tuned with the factors; inversion needs one, a meta-LoRA has none.
        base_model: name of the model that the factors were tuned on; "" when unknown.
        mean, std: input normalisation per RGB channel for pixels in [0, 1]; None when unknown.
        name: what to call it in messages, file names and model cards.
        base_class: class of that model with its module, "transformers.models.vit.modeling_vit.ViTModel"; "" when
            unknown.
        resize: "crop" or "squash", how images were brought to the model's size; None when unknown.
        notes: what reading left out, a line each.

    Raises:
        ValueError: no factors, an unknown site, shapes that do not fit together, numbers that are no floats, NaN,
            infinite or above a million.
    """

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        subfolder: str | None = None,
        cache_dir: str | PathLike[str] | None = None,
        local_files_only: bool = False,
        head: Head | str | PathLike[str] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> Adapter:
        """Read a PEFT adapter: a directory, or a Hugging Face Hub id.

        Written for transformers' ViT, DeiT, DINOv2 or CLIP vision models (the names of transformers 4 and 5) or
        for timm models. The head comes from `modules_to_save` in the adapter, or from a `head.safetensors` or
        `classifier.safetensors` beside it (keys `weight`, `bias`), or from `head=`.

        Args:
            path_or_id: directory with adapter_config.json and adapter_model.safetensors, or a Hub id "owner/name".
            revision: branch, tag or commit on the Hub; its default branch when None. Not for a directory.
            token: for private and gated repositories; the one of `hf auth login` when None, none at all when False.
            subfolder: folder of the adapter inside the directory or repository.
            cache_dir: where the Hub's files are kept; the Hub client's own cache when None.
            local_files_only: take what the cache has, without a network.
            head: a `Head`, or a safetensors file with `weight` [C, D] and `bias` [C]; replaces a saved one.
            class_names: names of the head's classes; read from the adapter's own files when left out.

        Raises:
            FileNotFoundError: no such directory or repository (or a private one that `token` does not open), a file
                is missing, or the cache does not have it.
            PermissionError: a gated repository, or a token that the Hub refuses.
            ConnectionError: no network, a Hub that is down, or (`HubRateLimitError`) too many requests.
            ValueError: unknown `revision`, or unreadable or foreign content; the message names rule and fix.
        """
        if is_peft_model(path_or_id):
            raise TypeError("`path_or_id` must be a folder or a Hub id, got a PEFT model; use `Adapter.from_peft`.")
        if Path(path_or_id).expanduser().is_file():
            _refuse_other_formats(Path(path_or_id).expanduser())
        folder = find_folder(
            path_or_id,
            FILES,
            what="a PEFT adapter",
            argument="path_or_id",
            marker=CONFIG_FILE,
            revision=revision,
            token=token,
            subfolder=subfolder,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        if not (folder / CONFIG_FILE).is_file():
            _refuse_other_formats(folder)
        local = Path(path_or_id).expanduser().is_dir()
        name = folder.resolve().name if local else "/".join(filter(None, (str(path_or_id), subfolder)))
        read = read_peft(folder, cls, name=name, head=head, class_names=class_names)
        siblings = find_siblings(folder) if local else ""
        return replace(read, notes=(*read.notes, siblings)) if siblings else read

    @classmethod
    def load(
        cls,
        source: str | PathLike[str] | Any,
        *,
        head: Head | str | PathLike[str] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> Adapter:
        """Read a PEFT adapter: a directory, a Hub id, or a PEFT model in memory; `from_pretrained` without the Hub's
        arguments, or `from_peft`."""
        if is_peft_model(source):
            return cls.from_peft(source, head=head, class_names=class_names)
        return cls.from_pretrained(source, head=head, class_names=class_names)

    @classmethod
    def from_peft(
        cls,
        model: Any,
        adapter_name: str | None = None,
        *,
        name: str | None = None,
        head: Head | str | PathLike[str] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> Adapter:
        """Read an adapter of a PEFT model in memory: a `PeftModel`, or a model of transformers after `add_adapter`.

        It is read through the files that PEFT writes of it, so that all of `from_pretrained` holds. A head under LoRA
        is merged with its weight, which the model has.

        Args:
            model: may be wrapped by DDP or torch.compile; it is left as it is.
            adapter_name: which one, where it has several; the active one when None.
            name: of the result; the adapter's name, or "adapter" for "default", when None.
            head, class_names: as in `from_pretrained`.

        Raises:
            TypeError: no PEFT model.
            ValueError: no adapter of that name, or no plain LoRA on a ViT's blocks.
        """
        return read_model(model, cls, adapter_name=adapter_name, name=name, head=head, class_names=class_names)

    @classmethod
    def from_lora_vit(
        cls,
        file: str | PathLike[str],
        base: BaseModel,
        *,
        sites: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
        scaling: float = 1.0,
        head: Head | None = None,
        class_names: Sequence[str] = (),
    ) -> Adapter:
        """Read a file of LoRA-ViT, or of LoRA Recycle's published code, which builds on it.

        One safetensors file with `w_a_NNN` [r, in] and `w_b_NNN` [out, r], the k-th of the one with the k-th of the
        other, in the order of the model, and maybe the head's weight as `fc_768in_10out`.

        Args:
            file: the file.
            base: the `Backbone` that it was tuned on; the file names no model.
            sites: what a block's pairs adapt, of q, k, v, proj, fc1, fc2, qkv. When None it follows from their number:
                q and v for two, as LoRA-ViT has; q, k, v for three; with proj for four; all for six; qkv for one.
            layers: the blocks that are adapted; all when None.
            scaling: of the update; that code adds `B A x` as it is, which is 1.
            head: in place of the file's; `notes` say where that is left out.
            class_names: of the file's head.

        Raises:
            FileNotFoundError: no such file.
            TypeError: `base` is no Backbone.
            ValueError: other content, or factors that do not fit `base`.
        """
        return read_lora_vit(
            file, base, cls, sites=sites, layers=layers, scaling=scaling, head=head, class_names=class_names
        )

    @classmethod
    def from_clip_lora(cls, file: str | PathLike[str], base: BaseModel) -> Adapter:
        """Read the vision half of a file of CLIP-LoRA (`lora_weights.pt`), whose scaling is `alpha / sqrt(r)`.

        It is a pickle, of which torch reads tensors and plain values only (`weights_only=True`).

        Args:
            file: the file.
            base: the `Backbone` of the CLIP model that it was tuned on, such as "openai/clip-vit-base-patch16".

        Raises:
            FileNotFoundError: no such file.
            TypeError: `base` is no Backbone.
            ValueError: other content, the text tower only, or factors that do not fit `base`.
        """
        return read_clip_lora(file, base, cls)

    def save(
        self,
        directory: str | PathLike[str],
        *,
        layout: str = "timm",
        config: Mapping[str, object] | None = None,
        sources: Sequence[AdapterValue] = (),
    ) -> Path:
        """Write a PEFT directory that `peft.PeftModel.from_pretrained` loads, with a model card.

        Files are written aside and put in place at the end, so earlier ones stay whole if writing fails.

        Args:
            directory: made if absent.
            layout: the class whose names are written; PEFT applies nothing on any other, and only warns.
                - "timm": timm's VisionTransformer; q, k and v become one block-structured pair of the qkv layer;
                - "vit", "deit", "dinov2", "dinov2_with_registers", "clip_vision_model": what the installed transformers
                  calls things in ViTModel (which AutoModel gives) and so on, or, for an adapter with a head, in
                  ViTForImageClassification and so on;
                - "vit-classifier" and so on: ViTForImageClassification and so on, with a head or without;
                - "clip": CLIPModel, which has both towers.
            config: settings of the run that made it, for the model card.
            sources: the adapters that went in, for the model card (name and hash each).

        Returns:
            the directory.
        """
        return write_peft(self, directory, layout=layout, config=config, sources=sources)

    def save_pretrained(
        self,
        save_directory: str | PathLike[str],
        *,
        layout: str = "timm",
        config: Mapping[str, object] | None = None,
        sources: Sequence[AdapterValue] = (),
        push_to_hub: bool = False,
        repo_id: str | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> Path:
        """`save` under the name that PEFT and transformers use; with `push_to_hub=True` the Hub gets it as well.

        Args:
            save_directory, layout, config, sources: as in `save`.
            push_to_hub: also upload; the arguments from here on are those of `push_to_hub`.
            repo_id: the directory's name, under your own account, when None.

        Returns:
            the directory.

        Raises:
            ValueError: an argument for the Hub without `push_to_hub=True`; and what `push_to_hub` raises.
        """
        for_hub = {
            "repo_id": repo_id,
            "private": private,
            "commit_message": commit_message,
            "token": token,
            "revision": revision,
            "create_pr": create_pr or None,
        }
        unused = [argument for argument, value in for_hub.items() if value is not None]
        if unused and not push_to_hub:
            raise ValueError(
                f"`push_to_hub` must be True where `{unused[0]}` is given, got False; leave `{unused[0]}` out."
            )
        folder = self.save(save_directory, layout=layout, config=config, sources=sources)
        if push_to_hub:
            self.push_to_hub(
                repo_id or folder.resolve().name,
                layout=layout,
                config=config,
                sources=sources,
                private=private,
                commit_message=commit_message,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        *,
        layout: str = "timm",
        config: Mapping[str, object] | None = None,
        sources: Sequence[AdapterValue] = (),
        private: bool | None = None,
        commit_message: str | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """Upload to the Hugging Face Hub what `save` writes, in one commit; the repository is made if absent.

        A head.safetensors that an earlier push left there is deleted when this adapter has none.

        Args:
            repo_id: "owner/name", or "name" under your own account.
            layout, config, sources: as in `save`.
            private: of a new repository; the account's own setting when None.
            commit_message: "Upload <name> with lorarecycle" when None.
            token: with write access; the one of `hf auth login` when None.
            revision: branch, made if absent; the default branch when None.
            create_pr: open a pull request instead of writing to the branch.

        Returns:
            the commit; as text, its URL. `oid` is its hash, `pr_url` that of the pull request.

        Raises:
            PermissionError: no token, or one without write access there.
            ConnectionError: no network, a Hub that is down, or (`HubRateLimitError`) too many requests.
            FileNotFoundError: a repository that `token` does not open.
            ValueError: an impossible `repo_id`, unknown layout.
        """
        with tempfile.TemporaryDirectory() as parent:
            folder = self.save(Path(parent) / "adapter", layout=layout, config=config, sources=sources)
            return push_folder(
                folder,
                repo_id,
                private=private,
                commit_message=commit_message or f"Upload {self.name} with lorarecycle",
                token=token,
                revision=revision,
                create_pr=create_pr,
                delete=OWN_HEAD_FILES,
            )


def _refuse_other_formats(path: Path) -> None:
    """Raises ValueError where a file, or the one file in a folder, is of a format that another reader takes."""
    files = [path] if path.is_file() else sorted(file for file in path.glob("[!.]*") if file.is_file())
    for file in files:
        if file.suffix == ".safetensors" and is_lora_vit(file):
            raise ValueError(
                f"`path_or_id` must be a PEFT adapter, got LoRA-ViT's file {file}; use "
                "`Adapter.from_lora_vit(file, Backbone.load(base))`, or `lorarecycle convert`."
            )
        if path.is_file() and file.suffix in (".pt", ".pth"):
            raise ValueError(
                f"`path_or_id` must be a PEFT adapter, got {file}; for a file of CLIP-LoRA use "
                "`Adapter.from_clip_lora(file, Backbone.load(base))`, or `lorarecycle convert`."
            )
