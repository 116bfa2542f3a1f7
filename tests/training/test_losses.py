"""What methods change in the loss, and Fisher information, against answers worked out by hand."""

import math

import pytest
import torch
from open_clip.loss import DistillClipLoss

from tic_clip import weights
from tic_clip.training.losses import count_fisher, estimate_fisher, method_loss

LWF = {"method": "lwf", "teacher": "last.pt", "loss_weight": 3.0, "temperature": 2.0}


def test_distillation_has_a_weight_and_a_temperature():
    """Of two classes: teacher's logits 2 and 0, student's 0 and 4."""
    features = torch.eye(2)
    inputs = {"image_features": features, "text_features": features, "logit_scale": torch.tensor(4.0)}
    inputs |= {"dist_image_features": features, "dist_text_features": features, "dist_logit_scale": torch.tensor(2.0)}
    plain = DistillClipLoss()(**inputs, output_dict=True)
    changed = method_loss(DistillClipLoss(), LWF, {})(**inputs, output_dict=True)
    assert changed["contrastive_loss"] == plain["contrastive_loss"]
    teacher = 1 / (1 + math.exp(-1))  # of logits 2 / 2 and 0 / 2
    entropy = teacher * math.log(1 + math.exp(-2)) + (1 - teacher) * math.log(1 + math.exp(2))
    assert changed["distill_loss"].item() == pytest.approx(3 * 2**2 * entropy, rel=1e-5)
    stock = {**LWF, "loss_weight": 1.0, "temperature": 1.0}
    same = method_loss(DistillClipLoss(), stock, {})(**inputs, output_dict=True)
    assert same == plain


@pytest.mark.parametrize(("passes", "expected"), [(1, 190), (2, 95)])  # each of two passes adds half
def test_ewcs_term(tmp_path, passes, expected):
    weights.write({"state_dict": {"w": torch.zeros(2), "buffer": torch.ones(1)}}, tmp_path / "checkpoints/epoch_2.pt")
    weights.write({"state_dict": {"w": torch.tensor([3.0, 4.0])}}, tmp_path / "checkpoints/fisher.pt")
    plan = {"method": "ewc", "teacher": None, "anchor": str(tmp_path / "checkpoints/epoch_2.pt"), "loss_weight": 10}
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    losses = method_loss(lambda **_: {"contrastive_loss": 1}, plan, {"w": w}, passes)(output_dict=True)
    assert losses["contrastive_loss"] == 1
    assert losses["ewc_loss"].item() == expected  # 10 (3 · 1 + 4 · 4)
    losses["ewc_loss"].backward()
    assert w.grad.tolist() == [60 / passes, 160 / passes]
    first = lambda: None  # noqa: E731
    assert method_loss(first, plan | {"anchor": None}, {"w": w}) is first


class Net(torch.nn.Module):
    """Images and texts are features, times a weight each; one weight takes no part."""

    def __init__(self):
        super().__init__()
        self.image, self.text, self.unused = (torch.nn.Parameter(torch.tensor(v)) for v in (0.5, 2.0, 1.0))
        self.logit_scale = torch.nn.Parameter(torch.tensor(0.7))

    def encode_image(self, images, normalize):
        return images * self.image

    def encode_text(self, texts, normalize):
        return texts * self.text


def test_fisher_information_is_the_mean_squared_gradient():
    """The slow way: numerical derivatives of the cross-entropies of both directions, batch by batch."""
    torch.manual_seed(0)
    batches = [(torch.randn(4, 3), torch.randn(4, 3)) for _ in range(3)]
    net = Net().double()
    found = estimate_fisher(net, [(i.double(), t.double()) for i, t in batches], "cpu")

    def loss(images, texts, image, text, logit_scale):
        logits = math.exp(logit_scale) * image * text * images.double() @ texts.double().T
        return sum(-torch.diag(part.log_softmax(1)).mean() for part in (logits, logits.T)).item() / 2

    values = {"image": 0.5, "text": 2.0, "logit_scale": 0.7}
    for name, value in values.items():
        squares = []
        for batch in batches:
            up, down = (loss(*batch, **{**values, name: value + step}) for step in (1e-5, -1e-5))
            squares.append(4 * ((up - down) / 2e-5) ** 2)
        assert found[name].item() == pytest.approx(sum(squares) / 3, rel=1e-4)
    assert found["unused"] == 0


def test_on_how_many_samples_it_is_taken():
    cases = {(6_400, 64): 320, (384, 64): 64, (18_432_000, 4096): 19_968, (320, 32): 32, (640, 32): 32}
    assert {case: count_fisher(*case) for case in cases} == cases
