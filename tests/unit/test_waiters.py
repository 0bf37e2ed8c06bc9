"""The queue: first come, first served within a user; users take turns."""

from __future__ import annotations

from lxc_pool.host.processes import ProcessIdentity
from lxc_pool.service.waiters import Ticket, WaitQueue

OWNER = ProcessIdentity("boot", 1, 1)


def ticket(uid: int, name: str = "") -> Ticket:
    return Ticket(name, uid, "default", name, OWNER, None, None, lambda: None)


def queue_of(*tickets: Ticket) -> WaitQueue:
    queue = WaitQueue()
    for each in tickets:
        queue.push(each)
    return queue


def drain(queue: WaitQueue) -> list[Ticket]:
    return [queue.pop() for _ in range(len(queue))]


def test_one_users_tickets_are_served_in_the_order_in_which_they_came() -> None:
    tickets = [ticket(1) for _ in range(5)]
    queue = queue_of(*tickets)
    assert len(queue) == 5
    assert drain(queue) == tickets
    assert not queue


def test_users_take_turns_however_many_tickets_one_of_them_has() -> None:
    a, b, c, x, y = ticket(1), ticket(1), ticket(1), ticket(2), ticket(2)
    assert drain(queue_of(a, b, c, x, y)) == [a, x, b, y, c]


def test_a_user_who_comes_back_stands_behind_those_who_have_not_been_served_since() -> None:
    a, b, x = ticket(1), ticket(1), ticket(2)
    queue = queue_of(a, x)
    assert queue.pop() is a
    queue.push(b)
    assert drain(queue) == [x, b]


def test_iterates_in_the_order_of_service_without_serving() -> None:
    queue = queue_of(*(ticket(uid) for uid in (1, 1, 2, 3, 3, 3)))
    order = list(queue)
    assert len(queue) == 6
    assert drain(queue) == order
    assert list(WaitQueue()) == []


def test_a_tickets_place_counts_those_who_are_served_before_it() -> None:
    a, b, x = ticket(1), ticket(1), ticket(2)
    queue = queue_of(a, b, x)
    assert [queue.position(each) for each in (a, x, b)] == [1, 2, 3]
    assert queue.position(ticket(9)) == 4


def test_a_removed_ticket_is_skipped_and_removing_it_again_is_no_error() -> None:
    a, b, x = ticket(1), ticket(1), ticket(2)
    queue = queue_of(a, b, x)
    queue.remove(a)
    queue.remove(a)
    queue.remove(ticket(3))
    assert drain(queue) == [b, x]


def test_a_user_whose_last_ticket_was_removed_has_no_turn() -> None:
    a, x = ticket(1), ticket(2)
    queue = queue_of(a, x)
    queue.remove(a)
    assert queue.pop() is x
    assert len(queue) == 0


def test_tickets_of_the_same_content_are_told_apart() -> None:
    a, b = ticket(1, "same"), ticket(1, "same")
    queue = queue_of(a, b)
    queue.remove(b)
    assert queue.pop() is a


def test_a_ticket_is_answered_by_an_error_too() -> None:
    asked = ticket(1)
    assert not asked.answered
    asked.error = ValueError()
    assert asked.answered
