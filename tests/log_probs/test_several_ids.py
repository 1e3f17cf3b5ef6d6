"""K ids of each token: log-probs over the whole vocabulary, and a gradient for each of them."""

from __future__ import annotations

import pytest
import torch
from batches import Error
from graphs import in_one_graph
from grids import grid
from head_cases import head_case, products

from steppo_kernels import linear_token_log_probs, token_log_probs

_DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "fp16": torch.half, "bf16": torch.bfloat16}
# The ids of a token, by how they are drawn.
_DRAWN = ("random", "with the likeliest", "some twice", "all one", "every")


class Case:
    """A head whose tokens have K ids; those of masked tokens are garbage."""

    def __init__(self, drawn, dtype, device, count=5, vocabulary=23, sharp=1.0):
        case = head_case(5, vocabulary=vocabulary, sharp=sharp)
        generator = torch.Generator().manual_seed(8)
        shape = (*case.mask.shape, vocabulary if drawn == "every" else count)
        ids = torch.randint(0, vocabulary, shape, generator=generator)
        likely = (case.hidden.nan_to_num(0.0) @ case.weight.t()).argmax(-1)
        if drawn == "with the likeliest":
            ids[..., count // 2] = likely
        elif drawn == "some twice":
            ids[..., 1], ids[..., -1] = ids[..., 0], likely
            ids[..., 2] = likely
        elif drawn == "all one":
            ids[...] = likely.unsqueeze(-1)
        elif drawn == "every":
            ids = torch.rand(shape, generator=generator).argsort(-1)
        self.mask = case.mask.to(device)
        self.ids = torch.where(case.mask.unsqueeze(-1), ids, 2**40).to(device)
        self.upstream = torch.randn(ids.shape, generator=generator, dtype=torch.float64)
        # Sums of 0, single gradients, and rows without any.
        self.upstream[:, ::4] -= self.upstream[:, ::4].mean(-1, keepdim=True)
        self.upstream[:, 1::4, 1:] = 0.0
        self.upstream[:, 2::4] = 0.0
        self.upstream = torch.where(case.mask.unsqueeze(-1), self.upstream, 0.0)
        self.of_entropy = torch.where(case.mask, 0.3, 0.0)
        self.head = case.to(dtype, device)

    def gradients(self, log_probs, entropy, leaves):
        total = (log_probs * self.upstream.to(log_probs)).sum()
        total = total + (entropy * self.of_entropy.to(entropy)).sum()
        return torch.autograd.grad(total, leaves)

    def exact(self, temperature, softcap, bias, dtype=torch.float64):
        """What plain PyTorch makes of it, and the gradients of hidden states, weight and bias."""
        head = self.head.to(dtype, "cpu")
        hidden = torch.where(self.mask.cpu().unsqueeze(-1), head.hidden, 0.0)
        z = hidden @ head.weight.t()
        z = z + head.bias if bias else z + 0 * head.bias
        z = softcap * torch.tanh(z / softcap) if softcap else z
        log_p = (z / temperature).log_softmax(-1)
        mask = self.mask.cpu()
        ids = torch.where(mask.unsqueeze(-1), self.ids.cpu(), 0)
        log_probs = torch.where(mask.unsqueeze(-1), log_p.gather(-1, ids), 0.0)
        entropy = torch.where(mask, -(log_p.exp() * log_p).sum(-1), 0.0)
        found = [log_probs, entropy]
        leaves = [head.hidden, head.weight, head.bias]
        return [x.detach() for x in found] + list(self.gradients(*found, leaves))

    def from_head(self, backend, temperature, softcap, bias, chunk=None):
        head = self.head
        found = linear_token_log_probs(
            head.hidden,
            head.weight,
            self.ids,
            bias=head.bias if bias else None,
            temperature=temperature,
            softcap=softcap or None,
            mask=self.mask,
            return_entropy=True,
            chunk_tokens=chunk,
            backend=backend,
        )
        leaves = [head.hidden, head.weight, *([head.bias] if bias else [])]
        return [x.detach() for x in found] + list(self.gradients(*found, leaves))


@grid(cover=1, drawn=_DRAWN, dtype=_DTYPES, softcap=[0.0, 3.0], bias=[False, True], chunk=[None, 4])
def test_from_the_head(target, drawn, dtype, softcap, bias, chunk):
    case = Case(drawn, dtype, target.device)
    found = case.from_head(target.backend, 0.7, softcap, bias, chunk)
    exact = case.exact(0.7, softcap, bias)
    if dtype.itemsize == 2:
        plain = case.exact(0.7, softcap, bias, dtype)
    else:
        plain = [torch.zeros_like(value) + value for value in exact]
    eps = torch.finfo(dtype).eps
    for got, value, other in zip(found, exact, plain, strict=False):
        allowed = Error.between(other, value).rms + 20 * eps
        assert Error.between(got, value).rms <= allowed
    # Garbage of masked tokens reaches nothing.
    assert (found[0][~case.mask] == 0).all()
    assert (found[2][~case.mask] == 0).all()


@grid(cover=1, drawn=_DRAWN, dtype=_DTYPES, inplace=[False, True], by_token=[False, True])
def test_from_logits(target, drawn, dtype, inplace, by_token):
    case = Case(drawn, torch.float64, target.device)
    hidden = torch.where(case.mask.unsqueeze(-1), case.head.hidden, 0.0)
    logits = (hidden @ case.head.weight.t()).detach().to(dtype)
    temperature = case.head.temperatures.float().nan_to_num(1.0) if by_token else 0.7
    leaf = logits.masked_fill(~case.mask.unsqueeze(-1), torch.nan).requires_grad_()
    found = token_log_probs(
        leaf.clone() if inplace else leaf,
        case.ids,
        temperature=temperature,
        mask=case.mask,
        return_entropy=True,
        inplace_backward=inplace,
        backend=target.backend,
    )
    (grad,) = case.gradients(*found, [leaf])
    plain = logits.double().cpu().requires_grad_()
    scale = temperature.double().cpu().unsqueeze(-1) if by_token else temperature
    log_p = (plain / scale).log_softmax(-1)
    mask = case.mask.cpu()
    ids = torch.where(mask.unsqueeze(-1), case.ids.cpu(), 0)
    log_probs = torch.where(mask.unsqueeze(-1), log_p.gather(-1, ids), 0.0)
    entropy = torch.where(mask, -(log_p.exp() * log_p).sum(-1), 0.0)
    (exact,) = case.gradients(log_probs, entropy, [plain])
    limit = {torch.float64: 1e-12, torch.float32: 3e-6}.get(dtype, 3e-6)
    for got, value in zip(found, (log_probs, entropy), strict=True):
        torch.testing.assert_close(got.double().cpu(), value, rtol=limit, atol=limit)
    limit += torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0
    torch.testing.assert_close(grad.double().cpu(), exact, rtol=limit, atol=limit)


def test_what_is_left_of_a_certain_id(kernel):
    """The log-prob and the gradient of an id of probability 1 - 1e-9 have all digits of fp32."""
    logits = torch.zeros(3, 50, dtype=torch.float32, device=kernel.device)
    logits[:, 7] = torch.tensor([20.0, 24.0, 28.0])
    leaf = logits.requires_grad_()
    ids = torch.tensor([[3, 7, 9], [7, 7, 1], [1, 2, 7]], device=kernel.device)
    upstream = torch.tensor([[0.0, 2.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 2.0]]).to(kernel.device)
    found = token_log_probs(leaf, ids, backend=kernel.backend)
    (found * upstream).sum().backward()
    others = 49 * torch.exp(-torch.tensor([20.0, 24.0, 28.0], dtype=torch.float64))
    exact = -torch.log1p(others)
    got = torch.stack([found[0, 1], found[1, 0], found[2, 2]]).double().cpu()
    torch.testing.assert_close(got, exact, rtol=2e-6, atol=0.0)
    wanted = 2 * -torch.expm1(exact)
    torch.testing.assert_close(leaf.grad[:, 7].double().cpu(), wanted, rtol=2e-6, atol=0.0)


def test_one_id_is_what_it_is_without_a_dimension(target):
    """Also beside others: each of K ids has the bits of a call of its own, but for the rounding."""
    case = Case("random", torch.float32, target.device)
    given = case.head.hidden, case.head.weight
    options = {"mask": case.mask, "return_entropy": True, "backend": target.backend}
    every, entropy = linear_token_log_probs(*given, case.ids, **options)
    assert every.shape == case.ids.shape
    assert entropy.shape == case.mask.shape
    for at in range(case.ids.shape[-1]):
        one, of_rows = linear_token_log_probs(*given, case.ids[..., at], **options)
        torch.testing.assert_close(every[..., at], one, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(entropy, of_rows, rtol=2e-6, atol=2e-6)
    single, _ = linear_token_log_probs(*given, case.ids[..., :1], **options)
    one, _ = linear_token_log_probs(*given, case.ids[..., 0], **options)
    assert torch.equal(single[..., 0], one)


def test_all_ids_come_from_one_pass(kernel):
    counts = []
    for count in (1, 16):
        case = Case("random", torch.float32, kernel.device, count)
        case.upstream = torch.where(case.mask.cpu().unsqueeze(-1), 1.0, 0.0).double()
        with products() as counter:
            case.from_head(kernel.backend, 1.0, 0.0, False)
        counts.append(counter.operations)
    # Rows without a gradient are as many.
    assert counts[0] == counts[1]


def test_bits_do_not_depend_on_the_order_of_ids(kernel):
    case = Case("some twice", torch.float32, kernel.device)
    order = torch.tensor([3, 1, 4, 0, 2])
    first = case.from_head(kernel.backend, 0.9, 2.0, True)
    again = case.from_head(kernel.backend, 0.9, 2.0, True)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)
    case.ids = case.ids[..., order.to(case.ids.device)]
    case.upstream = case.upstream[..., order]
    turned = case.from_head(kernel.backend, 0.9, 2.0, True)
    assert torch.equal(turned[0], first[0][..., order.to(case.ids.device)])
    for one, other in zip(turned[2:], first[2:], strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)


def test_shapes(target):
    logits = torch.randn((2, 3, 11), generator=torch.Generator().manual_seed(1)).to(target.device)
    ids = torch.randint(0, 11, (2, 3, 4), device=target.device)
    wanted = token_log_probs(logits, ids, backend=target.backend)
    for rows, given in (
        (logits.view(6, 11), ids),
        (logits.view(6, 11), ids.view(6, 4)),
        (logits, ids.view(6, 4)),
        (logits, ids.view(2, 1, 3, 4)),
    ):
        found = token_log_probs(rows, given, backend=target.backend)
        assert found.shape == given.shape
        assert torch.equal(found.view(-1), wanted.view(-1))
    # One id each is K ids too.
    alone = token_log_probs(logits, ids[..., :1].reshape(6, 1), return_entropy=True)
    assert [one.shape for one in alone] == [(6, 1), (6,)]
    assert torch.equal(alone[0].view(-1), token_log_probs(logits, ids[..., 0]).view(-1))
    empty = token_log_probs(logits[:0], ids[:0], backend=target.backend)
    assert empty.shape == (0, 3, 4)
    for bad in (ids[..., :0], ids.transpose(0, 1), ids[:, :2]):
        with pytest.raises(ValueError, match=r"^token_ids: got shape "):
            token_log_probs(logits, bad, backend=target.backend)


@pytest.mark.parametrize("bad", [-1, 11, 2**31, -(2**63)])
def test_ids_out_of_range(target, bad):
    logits = torch.randn(2, 11, device=target.device, requires_grad=True)
    ids = torch.tensor([[1, 2], [3, bad]], device=target.device)
    if target.device == "cpu":
        with pytest.raises(ValueError, match=rf"^token_ids: got {bad}, expected ids from 0 to 10"):
            token_log_probs(logits, ids, backend=target.backend)
        return
    found = token_log_probs(logits, ids, backend=target.backend)
    found.sum().backward()
    assert found[0].isfinite().all()
    assert found[1, 0].isfinite()
    assert found[1, 1].isnan()
    assert logits.grad[1].isnan().any()
    assert logits.grad[0].isfinite().all()


def test_what_goes_with_one_id_alone(target):
    from steppo_kernels import StepLayout, TokenSupport, steppo_loss_from_logits

    logits = torch.randn(2, 3, 11, device=target.device)
    ids = torch.zeros((2, 3, 4), dtype=torch.int64, device=target.device)
    support = TokenSupport.from_mask(torch.ones(2, 3, 11)).to(target.device)
    with pytest.raises(ValueError, match=r"^support: got it with 4 ids of each token"):
        token_log_probs(logits, ids, support=support, backend=target.backend)
    with pytest.raises(ValueError, match=r"^support: got it with 4 ids of each token"):
        linear_token_log_probs(logits, logits[0], ids, support=support, backend=target.backend)
    layout = StepLayout.from_mask(torch.ones(2, 3, device=target.device))
    with pytest.raises(ValueError, match=r"^token_ids: got shape "):
        steppo_loss_from_logits(
            logits, ids, None, torch.ones(2, device=target.device), layout, backend=target.backend
        )


def test_compiled_code(kernel):
    if kernel.interpreted:
        pytest.skip("what is compiled around interpreted kernels is no different")
    case = Case("some twice", torch.float64, kernel.device)
    hidden = torch.where(case.mask.unsqueeze(-1), case.head.hidden, 0.0)
    logits = (hidden @ case.head.weight.t()).detach()
    ids = torch.where(case.mask.unsqueeze(-1), case.ids, 0)

    def run(leaf):
        return (token_log_probs(leaf * 1.0, ids, backend=kernel.backend) * 0.5).sum()

    found = []
    for function in (run, in_one_graph(run)):
        leaf = logits.clone().requires_grad_()
        value = function(leaf)
        value.backward()
        found.append((value.detach(), leaf.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
