"""The closed form against a plain dense solve."""

import torch

from ibke.editors.aggregate import inverse_times, regress, solve
from ibke.editors.ibke.statistics import key_spectrum

EDITS, TOKENS, CONTRAST, D_IN, D_OUT, RANK = 3, 5, 4, 24, 10, 8


def ground():
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    basis = torch.linalg.qr(draw(D_IN, RANK))[0]
    spectrum, rest = draw(RANK).abs() + 0.5, torch.tensor(0.3, dtype=torch.float64)
    mask = torch.ones(EDITS, TOKENS, dtype=torch.bool)
    mask[1, 3:] = False
    return (
        draw(EDITS, TOKENS, D_IN),
        draw(EDITS, TOKENS, D_OUT),
        mask,
        draw(EDITS, CONTRAST, D_IN),
        basis,
        spectrum,
        rest,
    )


def dense_B(basis, spectrum, rest):
    outside = torch.eye(D_IN, dtype=torch.float64) - basis @ basis.T
    return basis @ torch.diag(spectrum) @ basis.T + rest * outside


def test_the_closed_form_is_the_dense_solve():
    keys, values, mask, contrast, basis, spectrum, rest = ground()
    rho = 2.5
    weight = torch.full((EDITS, CONTRAST), rho, dtype=torch.float64)
    weight[2] = 0.0
    own = torch.linspace(0.5, 3.0, EDITS * TOKENS, dtype=torch.float64).view(EDITS, TOKENS) * mask
    address = solve(keys, own.sqrt(), contrast, weight.sqrt(), lambda k: inverse_times(k, basis, spectrum, rest))
    for row in range(EDITS):
        k, v, n = keys[row][mask[row]], values[row][mask[row]], contrast[row] * weight[row].sqrt()[:, None]
        w = own[row][mask[row]].diag()
        wanted = torch.linalg.solve(k.T @ w @ k + n.T @ n + dense_B(basis, spectrum, rest), k.T @ w @ v)
        got = address[row].T @ (values[row] * mask[row][:, None])
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_contrast_keys_are_silenced():
    keys, _, mask, _, basis, spectrum, rest = ground()
    other = keys[:, :2] + 0.1 * torch.randn(
        EDITS, 2, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )

    def response(rho):
        weight = torch.full((EDITS, 2), rho, dtype=torch.float64)
        address = solve(keys, mask, other, weight.sqrt(), lambda k: inverse_times(k, basis, spectrum, rest))
        return (other @ address.transpose(1, 2)).abs().mean()

    assert response(1e4) < 0.05 * response(0.0)


def test_the_spectrum_keeps_what_it_says():
    samples = torch.randn(4000, D_IN) * torch.linspace(3, 0.1, D_IN)
    moment = samples.T @ samples / len(samples)
    spectrum = key_spectrum(moment, RANK)
    whole = torch.linalg.eigvalsh(moment).flip(0)
    torch.testing.assert_close(spectrum.values_E, whole[:RANK], rtol=1e-3, atol=1e-3)
    assert abs(spectrum.rest - whole[RANK:].mean().item()) < 1e-3
    torch.testing.assert_close(spectrum.basis_IE.T @ spectrum.basis_IE, torch.eye(RANK), rtol=0, atol=1e-5)


def test_regress_is_one_dense_ridge_regression():
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(TOKENS, D_IN, generator=generator, dtype=torch.float64)
    base = torch.randn(D_IN, D_IN, generator=generator, dtype=torch.float64)
    base = base @ base.T + torch.eye(D_IN, dtype=torch.float64)
    wanted = torch.linalg.solve(keys.T @ keys + base, keys.T).T
    torch.testing.assert_close(regress(keys, lambda rows: torch.linalg.solve(base, rows.T).T), wanted)
